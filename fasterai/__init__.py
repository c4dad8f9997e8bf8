__version__ = "0.1.0"


def _refuse_mixed_files():
    "PyPI's `fasterai` is another project, with files of the same names: installed into one folder, neither is whole"
    from pathlib import Path
    for record in Path(__file__).parent.parent.glob('fasterai-*.dist-info/RECORD'):
        if 'fasterai/__init__.py' not in record.read_text(encoding='utf-8'): continue  # an editable one lies elsewhere
        other = record.parent.name.removesuffix('.dist-info')
        raise ImportError(
            f"the distribution {other!r}, another project, was installed into the folder of fasterai-distill, and each "
            "has overwritten files of the other. Remove both (pip uninstall fasterai fasterai-distill), and install "
            "one of them again; whoever needs both gives each an environment of its own")


_refuse_mixed_files()
del _refuse_mixed_files
