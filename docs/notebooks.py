"Sphinx extension: exported cells become API entries, parameters tables, and names in backticks links"
import ast, base64, inspect, io, json, re
from configparser import ConfigParser
from importlib import import_module
from pathlib import Path

import numpy as np
from docutils import nodes
from entries import with_entries, write_pictures
from fastcore.docments import docments
from nbdev.doclinks import NbdevLookup
from nbformat.v4 import new_markdown_cell
from PIL import Image
from sphinx.util.nodes import make_refnode

root = Path(__file__).parent.parent
config = ConfigParser(delimiters='=')
config.read(root/'settings.ini', encoding='utf-8')
settings = config['DEFAULT']

# Exported cells -> API entries

def _directives(src):
    "nbdev's directives of a cell, such as `export`"
    return {m.split()[0]:m for m in re.findall(r'^#\s*\|\s*(\S.*)$', src, re.M)}

def _documented(body, mod):
    "(directive, name, options) of each public definition"
    for o in body:
        if isinstance(o, ast.Assign):
            for n in _assigned(o):
                if n in mod.__all__ and not n.startswith('__'): yield 'autodata', n, _of_value(vars(mod)[n])
        elif not isinstance(o, (ast.FunctionDef, ast.ClassDef)) or o.name.startswith('_'): continue
        elif 'patch' in (how := ''.join(map(ast.unparse, o.decorator_list))):
            yield 'autoproperty' if 'as_prop' in how else 'automethod', f'{_patched(o)}.{o.name}', ''
        elif o.name not in mod.__all__: continue
        elif isinstance(o, ast.FunctionDef): yield 'autofunction', o.name, ''
        else: yield 'autoclass', o.name, _of_members([m.name for m in o.body if _is_public_method(m)])

def _of_members(names): return f':members: {", ".join(names)}' if names else ''

def _of_value(v):
    "One that holds functions would be shown as addresses"
    return ':no-value:' if re.search(r'<(function|class|object|fasterai)', repr(v)) else ''

def _assigned(o): return [t.id for t in o.targets if isinstance(t, ast.Name)]

def _is_public_method(m):
    if not isinstance(m, ast.FunctionDef) or not ast.get_docstring(m): return False
    return m.name=='__call__' or m.name[0]!='_'

def _patched(f): return ast.unparse(f.args.args[0].annotation)

def _entries(src, modname):
    "A cell's definitions as autodoc directives"
    for kind,name,option in _documented(ast.parse(src).body, import_module(modname)):
        yield f'.. {kind}:: {modname}.{name}\n' + (f'   {option}\n' if option else '')

def _page(cells, docname):
    exports = [d['default_exp'].split()[1] for c in cells if 'default_exp' in (d := _directives(c['source']))]
    modname = f'fasterai.{exports[0]}' if exports else None
    for c in cells:
        found = _directives(c['source']) if c['cell_type']=='code' else {}
        if c['cell_type']=='raw' or found.keys() & {'hide', 'default_exp'}: continue
        if found.keys() & {'export', 'exports', 'exporti'}:
            entries = '\n'.join(_entries(c['source'], modname))
            if entries: yield _rst_cell(entries)
            continue
        if c['cell_type']=='code': c['outputs'] = [o for o in c['outputs'] if not _is_noise(o)]
        if found.get('echo:')=='echo: false': c['metadata']['tags'] = ['remove-input']
        if any(map(_drawn_on_white, c.get('outputs', ()))): c['metadata']['mystnb'] = {'image': {'classes': 'on-white'}}
        yield c
        if c is not cells[0]: continue
        if modname: yield _rst_cell(f'.. py:module:: {modname}')
        elif '/' in docname:
            yield new_markdown_cell(f'{{download}}`Download this notebook <{docname.split("/")[-1]}.ipynb>`')

def _rst_cell(text): return new_markdown_cell(f'```{{eval-rst}}\n{text}\n```')

def _is_noise(out):
    "What a progress bar leaves behind: a finished bar, a style, an empty line"
    html = ''.join(out.get('data', {}).get('text/html', '-'))
    return '<progress' in html or not re.sub(r'<style>.*?</style>', '', html, flags=re.S).strip()

def on_white(png):
    "Is a picture opaque, with a white edge? Dark pages turn such ones around"
    a = np.asarray(Image.open(io.BytesIO(png)).convert('RGBA')).astype(int)
    edge = np.concatenate([a[0], a[-1], a[:, 0], a[:, -1]])
    return bool((edge.min(1)>240).mean()>0.9)

def _drawn_on_white(out):
    png = out.get('data', {}).get('image/png')
    return png is not None and on_white(base64.b64decode(''.join(png)))

def read_index(app, docname, source):
    "Lists of pages with their pictures"
    if docname.endswith('/index'): source[0] = with_entries(source[0], _folder(app, docname), on_white)

def _folder(app, docname): return Path(app.srcdir)/Path(docname).parent

def write_entries(app, exc):
    "The lists' pictures"
    if exc or app.builder.name!='html': return
    folders = [_folder(app, d) for d in app.env.found_docs if d.endswith('/index')]
    write_pictures(folders, Path(app.outdir)/'_static'/'entries', Path(app.srcdir)/'images')

def read_notebook(app, docname, source):
    if app.env.doc2path(docname).suffix!='.ipynb': return
    nb = json.loads(source[0])
    for c in nb['cells']: c['source'] = ''.join(c['source'])
    nb['cells'] = list(_page(nb['cells'], docname))
    nb['metadata']['language_info'] = {'name': 'python', 'pygments_lexer': 'ipython3'}  # which knows `!command`
    if docname==app.config.root_doc:
        nb['cells'].append(new_markdown_cell((Path(app.confdir)/'contents.md').read_text(encoding='utf-8')))
    nb['metadata']['source_map'] = [*range(len(nb['cells']))]  # lines in ten thousands else, by which rst is padded
    source[0] = json.dumps(nb)

# Docstrings and docments

def _rst(s):
    "Text with names in backticks as RST, and with links to arXiv"
    parts = re.split(r'`([^`]+)`', s or '')
    text = ''.join(rf'\ ``{p}``\ ' if i%2 else re.sub(r'([*|_\\])', r'\\\1', p) for i,p in enumerate(parts))
    return re.sub(r'arXiv (\d{4}\.\d{4,5})', r'`arXiv \1 <https://arxiv.org/abs/\1>`__', text)

def _type(anno):
    if anno is inspect.Parameter.empty: return ''
    t = re.sub(r'(\w+\.)+(?=\w)', '', anno if isinstance(anno, str) else inspect.formatannotation(anno))
    return re.sub(r'^Union\[(.*)\]$', lambda m: m[1].replace(', ', ' | '), t)

def _default(v): return getattr(v, '__name__', None) or repr(v)

def _table(obj):
    "The documented parameters and the result as a list-table"
    params = docments(obj, full=True)
    if not any(o['docment'] for o in params.values()): return
    yield from ('', '.. list-table::', '   :header-rows: 1', '   :class: docments', '')
    for row in [('Parameter', 'Type', 'Default', 'Details'), *_rows(params)]:
        for i,col in enumerate(row): yield f"   {'*' if i==0 else ' '} - {col}"
    yield ''

def _rows(params):
    for name,o in params.items():
        t = _type(o['anno'])
        told = o['docment'] or name=='return' and t
        if name in ('self', 'cls', 'kwargs', 'return') and not told: continue
        d = o.get('default', inspect.Parameter.empty)
        default = '' if d is inspect.Parameter.empty else f'``{_default(d)}``'
        details = _rst(' '.join((o['docment'] or '').split()))
        yield 'Returns' if name=='return' else f'``{name}``', t and f'``{t}``', default, details

def add_docments(app, what, name, obj, options, lines):
    if what=='data': lines.clear()
    if what=='class' and vars(obj).get('__init__').__doc__: lines += ['', obj.__init__.__doc__]
    lines[:] = [_rst(l) for l in lines]
    if what in ('function', 'method', 'class'): lines += _table(obj)

def say_defaults(app, obj, bound_method):
    "A default that stands in the source under a name, as in `weight=UNSAID_WEIGHT`, by its value: a number says more"
    kept = getattr(obj, '__dict__', {})
    params = sig.parameters.values() if (sig := kept.get('__signature__')) else ()  # autodoc's, of the source's texts
    if not (named := [p for p in params if re.fullmatch('[A-Z][A-Z_]+', repr(p.default))]): return
    del kept['__signature__']
    given = inspect.signature(obj).parameters
    values = {p.name:float(given[p.name].default) for p in named if isinstance(given[p.name].default, float)}
    kept['__signature__'] = sig.replace(parameters=[p.replace(default=values.get(p.name, p.default)) for p in params])

def linkcode_resolve(domain, info):
    obj = inspect.unwrap(getattr(obj, 'fget', obj) if (obj := _find(info['module'], info['fullname'])) else obj)
    try: f,(lines,n) = inspect.getsourcefile(obj),inspect.getsourcelines(obj)
    except TypeError: return # a value, not a definition
    path = Path(f).relative_to(root).as_posix()
    return f"{settings['git_url']}/blob/{settings['branch']}/{path}#L{n}-L{n+len(lines)-1}"

def _find(modname, name):
    o = import_module(modname)
    for part in name.split('.'): o = getattr(o, part, None)
    return o

# Names in backticks -> links

_alias = {'nn':'torch.nn', 'F':'torch.nn.functional', 'Module':'torch.nn.Module', 'Tensor':'torch.Tensor'}

def _elsewhere(name):
    "URL of a name of fastai's, fastcore's or PyTorch's"
    if not re.search(r'[A-Z._]', name): return # an everyday word
    head,_,rest = name.partition('.')
    find = NbdevLookup('fastai fastcore').doc
    return find('.'.join(o for o in (_alias.get(head, head), rest) if o)) or find(f'Learner.{name}')

def link_names(app, doctree, docname):
    objects = app.env.get_domain('py').objects
    ours = {}
    for full,o in sorted(objects.items(), key=lambda o: o[1].docname==docname):  # this page's own last, to win
        ours[full] = o
        n = 2 if o.objtype in ('method', 'property', 'attribute') else 1
        if o.objtype!='module': ours['.'.join(full.split('.')[-n:])] = o
    for lit in list(doctree.findall(nodes.literal)):
        name = lit.astext().removesuffix('()')
        if isinstance(lit.parent, nodes.reference) or lit.get('language'): continue
        if not re.fullmatch(r'[A-Za-z][\w.]*', name): continue
        if o := ours.get(name): ref = make_refnode(app.builder, docname, o.docname, o.node_id, lit.deepcopy(), name)
        elif url := _elsewhere(name): ref = nodes.reference('', '', lit.deepcopy(), refuri=url, internal=False)
        else: continue
        lit.replace_self(ref)

def write_markdown(app, exc):
    "Beside each notebook's page its text as Markdown, `page.html.md`"
    if exc or app.builder.name!='html': return
    for doc in app.env.found_docs:
        if (f := app.env.doc2path(doc)).suffix!='.ipynb': continue
        cells = json.loads(f.read_text(encoding='utf-8'))['cells']
        text = '\n\n'.join(filter(None, map(_as_markdown, cells)))
        (Path(app.outdir)/f'{doc}.html.md').write_text(text+'\n', encoding='utf-8')

def _as_markdown(c):
    src = ''.join(c['source'])
    if _directives(src).keys() & {'hide', 'echo:'}: return ''
    return f'```python\n{src}\n```' if src and c['cell_type']=='code' else src

def setup(app):
    app.connect('source-read', read_notebook)
    app.connect('source-read', read_index)
    app.connect('autodoc-process-docstring', add_docments)
    app.connect('autodoc-before-process-signature', say_defaults, priority=600)  # after autodoc's own, at 500
    app.connect('doctree-resolved', link_names)
    app.connect('build-finished', write_markdown)
    app.connect('build-finished', write_entries)
    return dict(parallel_read_safe=True, parallel_write_safe=True)
