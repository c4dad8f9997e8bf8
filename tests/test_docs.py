"The site builds without a warning, knows every public name, leads nowhere that is not there, and needs no other host"
import http.server, pkgutil, re, shutil, subprocess, sys, threading, warnings
from functools import partial
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest

for o in ('sphinx', 'myst_nb', 'pydata_sphinx_theme', 'sphinx_copybutton'): pytest.importorskip(o)
import fasterai

root = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp('site')
    options = ['-E', '-W', '--keep-going', '-q', '-b', 'html', '-c', 'docs', '-d', out/'.doctrees']
    cmd = [sys.executable, '-m', 'sphinx', *options, 'nbs', out/'html']
    r = subprocess.run(cmd, cwd=root, capture_output=True, text=True)
    assert r.returncode==0, r.stderr
    return out/'html'


class _Page(HTMLParser):
    "What a page defines, links to, and loads"
    def __init__(self, file):
        super().__init__()
        self.ids,self.links,self.loads = set(),[],[]
        self.feed(file.read_text(encoding='utf-8'))

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        self.ids |= {a[k] for k in ('id', 'name') if a.get(k)}
        if tag=='a' and a.get('href'): self.links.append(a['href'])
        if a.get('src'): self.loads.append(a['src'])
        if tag!='link' or not a.get('href'): return
        if a.get('rel') in ('stylesheet', 'preload', 'icon', 'prefetch', 'preconnect'): self.loads.append(a['href'])


@pytest.fixture(scope='module')
def pages(site): return {f: _Page(f) for f in site.rglob('*.html') if '_static' not in f.parts}


def _modules():
    found = pkgutil.walk_packages(fasterai.__path__, 'fasterai.')
    return [import_module(m.name) for m in found if not m.ispkg and not m.name.endswith('_modidx')]


def test_no_page_shows_the_source_of_a_table_or_an_address(site):
    for f in site.rglob('*.html'): assert not re.search(r'\| — \||0x[0-9a-f]{6}', f.read_text(encoding='utf-8')), f


def test_every_public_name_has_an_entry(site):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        from sphinx.util.inventory import InventoryFile
        with open(site/'objects.inv', 'rb') as f: inv = InventoryFile.load(f, '', lambda *parts: '/'.join(parts))
    known = {n for kind,objs in inv.items() if kind.startswith('py:') for n in objs}
    names = {(m.__name__, n) for m in _modules() for n in m.__all__}
    def home(m, n):
        o = getattr(import_module(m), n)
        where = str(getattr(o, '__module__', ''))
        return f'{where}.{n}' if getattr(o, '__name__', None)==n and where.startswith('fasterai') else None
    def has_entry(m, n):
        at = home(m, n)
        if at is None: return f'{m}.{n}' in known or any(k.endswith(f'.{n}') for k in known)
        return at in known
    missing = [f'{m}.{n}' for m,n in sorted(names) if not has_entry(m, n)]
    assert len(names)>100 and not missing, missing


def test_links_and_anchors_resolve(site, pages):
    checked,bad = 0,[]
    for f,page in pages.items():
        for href in {*page.links, *page.loads}:
            if re.match(r'[a-z]+:', href): continue
            path,frag = urldefrag(href)
            to = f if not path else (f.parent/unquote(path.split('?')[0])).resolve()
            checked += 1
            if not to.exists(): bad.append((f.name, href))
            elif frag and to.suffix=='.html' and unquote(frag) not in pages[to].ids: bad.append((f.name, href))
    assert checked>1000 and not bad, bad


def test_nothing_is_loaded_from_elsewhere(site, pages):
    far = {src for p in pages.values() for src in p.loads if re.match(r'(https?:)?//', src)}
    loaded = re.compile(r'(?:@import\s+|url\()["\']?((?:https?:)?//[^"\')\s]+)')
    for f in site.rglob('*.css'): far |= set(loaded.findall(f.read_text(encoding='utf-8')))
    assert not far


def test_names_and_parameters(site):
    page = (site/'distill/loss/logits.html').read_text(encoding='utf-8')
    assert 'id="fasterai.distill.loss.logits.SoftTarget"' in page
    assert re.search(r'<td><p><code[^>]*>.*?teacher_pred.*?</code></p></td>', page, re.S)
    assert 'Teacher logits, same shape' in page
    page = (site/'distill/distillation_callback.html').read_text(encoding='utf-8')
    assert 'UNSAID' not in re.sub(r'<[^>]+>', '', page)
    home = (site/'index.html').read_text(encoding='utf-8')
    assert re.search(r'href="https://docs.fast.ai/[^"]*"[^>]*><code[^>]*><span class="pre">Learner</span>', home)
    assert 'distill/layers/matching.html#fasterai.distill.layers.matching.match_feature_layers' in home
    assert '_download' in (site/'tutorials/quick_start.html').read_text(encoding='utf-8')


def test_sources_are_linked_where_there_is_a_repository(site, monkeypatch):
    monkeypatch.syspath_prepend(root/'docs')
    notebooks = import_module('notebooks')
    if not notebooks.settings['git_url']:
        for f in site.rglob('*.html'): assert 'viewcode-link' not in f.read_text(encoding='utf-8'), f
    monkeypatch.setitem(notebooks.settings, 'git_url', 'https://example.org/us/ours')
    url = notebooks.linkcode_resolve('py', {'module': 'fasterai.distill.loss.logits', 'fullname': 'SoftTarget'})
    lines = (root/'fasterai/distill/loss/logits.py').read_text(encoding='utf-8').splitlines()
    n = next(i for i,l in enumerate(lines, 1) if l.startswith('def SoftTarget')) - 1
    assert lines[n-1]=='@as_loss' # a definition begins with its decorator
    assert url.startswith(f'https://example.org/us/ours/blob/main/fasterai/distill/loss/logits.py#L{n}-L')


def test_every_module_has_its_page(site):
    "Docstrings name no URL while there is none: the page of a module lies where its notebook does"
    for m in _modules():
        page = '/'.join(m.__name__.split('.')[1:])+'.html'
        assert len((site/f'{page}.md').read_text(encoding='utf-8'))>100 and (site/page).exists(), page
        made_of = re.search(r'File to edit: (\S+)\.$', Path(m.__file__).read_text(encoding='utf-8'), re.M)[1]
        assert (Path(m.__file__).parent/made_of).resolve()==(root/'nbs'/page.replace('.html', '.ipynb')).resolve(), m
        assert 'Docs:' not in m.__doc__, m


def test_lists_of_pages_have_a_picture_for_each(site):
    for folder in ('tutorials', 'howto', 'families'):
        page = (site/folder/'index.html').read_text(encoding='utf-8')
        entries = re.findall(r'<a class="entry" href="([\w.]+)"><span class="pic"><img src="([^"]+)"', page)
        files = {f.stem for f in (root/'nbs'/folder).iterdir() if f.suffix in ('.ipynb', '.md')} - {'index'}
        assert {Path(href).stem for href,_ in entries}==files
        assert all((site/folder/src).resolve().exists() for _,src in entries)
        assert sum(src.endswith('.png') for _,src in entries)>=len(entries)-3


def test_the_drawing_is_what_its_code_draws(monkeypatch):
    monkeypatch.syspath_prepend(root/'docs')
    drawn = (root/'nbs'/'images'/'teaching.svg').read_text(encoding='utf-8')
    assert import_module('drawing').drawing()==drawn


# A browser looks at the pages in frames of a desktop's and a phone's width, in both themes, and writes what it finds
# into this page. The report of the command is among them: it follows the reader's browser

_probe = '''<body><script>
const wait = ms => new Promise(r => setTimeout(r, ms))
async function look(url, width, theme) {
  localStorage.setItem('mode', theme); localStorage.setItem('theme', theme)
  const f = document.createElement('iframe'); f.width = width; f.height = 900; f.src = url
  f.style.colorScheme = theme; document.body.append(f)
  await new Promise(r => f.onload = r); await wait(700)
  const d = f.contentDocument, r = d.documentElement
  const found = d.querySelectorAll('#search-results li').length
  const all = d.querySelector('.bd-article') || d.body
  const boxed = e => {
    for (let p = e.parentElement; p && p!==all; p = p.parentElement)
      if (/auto|scroll/.test(getComputedStyle(p).overflowX)) return true }
  const wide = e => e.getBoundingClientRect().right > r.clientWidth+1 && !boxed(e)
  const loose = [...all.querySelectorAll('*')].filter(wide).length
  const rgb = getComputedStyle(d.body).color.match(/\\d+/g).slice(0, 3).map(Number)
  const text = (rgb[0]+rgb[1]+rgb[2])/3 > 128 ? 'dark' : 'light'
  const blank = [...d.images].filter(i => i.loading!='lazy' && !(i.complete && i.naturalWidth)).length
  const formulas = d.querySelectorAll('mjx-container').length
  const row = [url, width, theme, text, r.scrollWidth-r.clientWidth+loose, found, formulas, blank].join(' ')
  f.remove(); return row }
(async () => { const rows = []
  for (const url of PAGES) for (const width of [1440, 390])
    for (const theme of ['light', 'dark']) rows.push(await look(url, width, theme))
  document.body.innerHTML = '<pre id=rows>' + rows.join('\\n') + '</pre>' })()
</script></body>'''

chromium = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')

@pytest.fixture(scope='module')
def report(site):
    "The report of a short run of the command, served beside the site"
    command,out = Path(sys.executable).parent/'fasterai_distill',site/'_report'
    short = ['--epochs', '1', '--teacher-epochs', '1', '--seeds', '2', '--quick', '--out', out]
    r = subprocess.run([command, *short], capture_output=True, text=True)
    assert r.returncode==0, r.stderr
    yield '_report/report.html'
    shutil.rmtree(out)


@pytest.mark.skipif(chromium is None, reason='no browser')
def test_in_a_browser(site, report, tmp_path):
    seen = ['index.html', 'tutorials/index.html', 'tutorials/quick_start.html', 'tutorials/command.html',
            'howto/pair_layers.html', 'tutorials/theory.html', 'distill/loss/logits.html',
            'distill/distillation_callback.html', 'search.html?q=temperature', report]
    (site/'probe.html').write_text(_probe.replace('PAGES', str(seen)))
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), partial(Quiet, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        flags = ['headless', 'no-sandbox', 'disable-gpu', 'disable-quic', 'no-first-run',
                 'disable-background-networking', 'disable-component-update', 'disable-sync', 'enable-logging=stderr',
                 f'user-data-dir={tmp_path}',
                 'virtual-time-budget=120000', 'timeout=240000', 'dump-dom']
        cmd = [chromium, *(f'--{f}' for f in flags), f'http://127.0.0.1:{server.server_port}/probe.html']
        r = subprocess.run(cmd, capture_output=True, text=True, timeout=300)
    finally:
        server.shutdown()
        (site/'probe.html').unlink()
    rows = [l.split() for l in re.search(r'<pre id="rows">(.*?)</pre>', r.stdout, re.S)[1].splitlines()]
    assert len(rows)==4*len(seen)
    assert all(theme==got for _,_,theme,got,*_ in rows), rows
    assert not (wide := [o for o in rows if int(o[4])>0]), f'wider than the window: {wide}'
    assert all(int(o[5])>5 for o in rows if 'search' in o[0]), rows
    assert all(int(o[6])>0 for o in rows if 'loss/' in o[0]), rows
    assert not (blank := [o for o in rows if int(o[7])>0]), f'pictures that do not show: {blank}'
    assert not [l for l in r.stderr.splitlines() if 'CONSOLE' in l and re.search('Uncaught|Error|Failed', l)]
