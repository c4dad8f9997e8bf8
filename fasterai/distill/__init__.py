def __getattr__(name):
    "`from fasterai.distill import SoftTarget` is told where that is; modules are found as ever"
    from importlib.util import find_spec
    if name[:1]!='_' and find_spec(f'{__name__}.{name}') is None:
        from . import all as public
        if hasattr(public, name):
            raise ImportError(f"{name!r} is in fasterai.distill.all: from fasterai.distill.all import {name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
