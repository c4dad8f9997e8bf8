"nbconvert's settings for README.md: `python -m nbconvert --config docs/readme.py`"
import re


def for_github(nb, resources):
    "Code is Python, cells with `#| echo: false` show their output only, and paths start at the root"
    nb.metadata.language_info = {'name': 'python'}
    for c in nb.cells:
        if c.cell_type=='markdown': c.source = re.sub(r'\]\((?!\w+:|#|/)', '](nbs/', c.source)
        elif re.match(r'#\|\s*echo:\s*false', c.source): c.metadata.transient = {'remove_source': True}
    return nb,resources


c = get_config()  # noqa: F821
c.NbConvertApp.notebooks = ['nbs/index.ipynb']
c.NbConvertApp.export_format = 'markdown'
c.NbConvertApp.writer_class = 'StdoutWriter'
c.NbConvertApp.log_level = 'WARN'
c.NbConvertBase.display_data_priority = ['image/png', 'text/markdown', 'text/plain']
c.MarkdownExporter.preprocessors = [for_github]
c.TemplateExporter.exclude_input_prompt = True
c.TemplateExporter.exclude_output_prompt = True
