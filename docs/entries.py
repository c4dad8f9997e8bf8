"""The list of a folder's pages, each with its line and a picture: what stands for `% entries` in an `index.md`

The picture is the first of the stored outputs that is not much wider than high; pages without one get the drawing of
teacher and student."""
import base64, html, json, re, shutil, struct

DRAWING = 'teaching.svg'


def cells_of(file):
    "Sources of Markdown cells and outputs of a page"
    if file.suffix=='.md': return [file.read_text(encoding='utf-8')],[]
    cells = json.loads(file.read_text(encoding='utf-8'))['cells']
    texts = [''.join(c['source']) for c in cells if c['cell_type']=='markdown']
    return texts,[o for c in cells for o in c.get('outputs', ())]


def pictures(outputs):
    "PNGs as bytes"
    return [base64.b64decode(''.join(o['data']['image/png'])) for o in outputs if 'image/png' in o.get('data', {})]


def size_of(png): return struct.unpack('>II', png[16:24])


def picture_of(outputs):
    found = pictures(outputs)
    return next((o for o in found if size_of(o)[0]<=3.2*size_of(o)[1]), found[0] if found else None)


def plain(s):
    "A line without Markdown's marks"
    return html.escape(re.sub(r'\[([^\]]*)\]\([^)]*\)', r'\1', s).replace('`', '').replace('*', ''))


def in_order(folder, source):
    "The pages of a folder, those that its contents name first"
    named = re.findall(r'^([\w-]+)$', source.split('```{toctree}')[-1], re.M)
    files = {f.stem:f for f in sorted(folder.iterdir()) if f.suffix in ('.ipynb', '.md') and f.stem!='index'}
    return [files[n] for n in dict.fromkeys([*named, *files]) if n in files]


def entry(file, folder, on_white):
    "HTML of one page's entry"
    texts,outputs = cells_of(file)
    title = re.search(r'^# (.+)$', texts[0], re.M)[1]
    line = re.search(r'^> (.+)$', texts[0], re.M)
    png = picture_of(outputs)
    src = f'{folder}-{file.stem}.png' if png else DRAWING
    kind = ' class="on-white"' if png and on_white(png) else ''
    said = f'<span>{plain(line[1])}</span>' if line else ''
    return (f'<a class="entry" href="{file.stem}.html"><span class="pic"><img src="../_static/entries/{src}" '
            f'alt="" loading="lazy"{kind}></span><span><b>{plain(title)}</b>{said}</span></a>')


def with_entries(source, folder, on_white):
    "An index page's text with the list in its place"
    found = ''.join(entry(f, folder.name, on_white) for f in in_order(folder, source))
    return re.sub(r'^% entries$', lambda _: f'<div class="entries">{found}</div>', source, flags=re.M)


def write_pictures(folders, to, images):
    "The pictures that the lists show, into the site"
    to.mkdir(parents=True, exist_ok=True)
    shutil.copy(images/DRAWING, to)
    for folder in folders:
        for f in folder.iterdir():
            png = picture_of(cells_of(f)[1]) if f.suffix=='.ipynb' else None
            if png: (to/f'{folder.name}-{f.stem}.png').write_bytes(png)
