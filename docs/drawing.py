"Teacher and student, drawn: `python docs/drawing.py` writes `nbs/images/teaching.svg`, for light and dark pages"
from pathlib import Path

GREY,BLUE,ORANGE,GREEN = '#797979','#4a8fd4','#d9733a','#3f9f74'


def box(x, y, w, h, color, fill=0.15, r=6):
    return (f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="{r}" fill="{color}" fill-opacity="{fill}" '
            f'stroke="{color}" stroke-width="1.5"/>')


def text(x, y, s, color=GREY, size=14, anchor='middle'):
    return f'<text x="{x}" y="{y}" fill="{color}" font-size="{size}" text-anchor="{anchor}">{s}</text>'


def arrow(*points, color=GREY, dash=False):
    path = ' L'.join(f'{x},{y}' for x,y in points)
    dashes = ' stroke-dasharray="5 4"' if dash else ''
    return (f'<path d="M{path}" fill="none" stroke="{color}" stroke-width="1.8"{dashes} '
            f'marker-end="url(#tip-{color[1:]})"/>')


def network(x, y, name, color, heights, step):
    "Layers as boxes side by side, around the height `y`"
    boxes = [box(x+i*step, y-h/2, step-8, h, color) for i,h in enumerate(heights)]
    return [*boxes, text(x+(len(heights)*step-8)/2, y+max(heights)/2+20, name, color)]


def bars(x, y, shares, color):
    "Probabilities of the classes, on a line at `y`"
    found = [f'<rect x="{x+16*i}" y="{y-60*p:.0f}" width="11" height="{60*p:.0f}" fill="{color}"/>'
             for i,p in enumerate(shares)]
    return [*found, f'<line x1="{x-3}" y1="{y}" x2="{x+16*len(shares)-2}" y2="{y}" stroke="{GREY}"/>']


def tip(color):
    return (f'<marker id="tip-{color[1:]}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            f'orient="auto"><path d="M0,0 L8,4 L0,8 z" fill="{color}"/></marker>')


def drawing():
    soft,own,label = [.62, .24, .09, .05],[.44, .3, .16, .1],[1, 0, 0, 0]
    parts = [
        box(16, 96, 64, 64, GREY), text(48, 134, 'images'),
        arrow((80, 118), (112, 118), (112, 66), (146, 66)), arrow((80, 138), (112, 138), (112, 196), (146, 196)),
        *network(150, 66, 'teacher: trained before, frozen', BLUE, [96, 84, 72, 60, 48, 40], 30),
        *network(150, 196, 'student: learns', ORANGE, [48, 36, 28], 30),
        arrow((322, 66), (376, 66)), *bars(386, 94, soft, BLUE),
        arrow((232, 196), (376, 196)), *bars(386, 222, own, ORANGE),
        arrow((418, 100), (418, 156), color=GREEN), text(428, 134, 'how far apart?', GREEN, anchor='start'),
        *bars(576, 222, label, GREY), text(606, 242, 'label'),
        arrow((570, 196), (458, 196), color=GREEN), text(514, 188, 'how wrong?', GREEN),
        arrow((418, 230), (418, 268), (190, 268), (190, 246), color=GREEN, dash=True),
        text(304, 262, 'the student follows both', GREEN)]
    style = 'font-family="system-ui, sans-serif"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 660 280" width="660" height="280" {style} role="img">'
    title = '<title>Teacher and student see the same images; the student learns from the labels and the teacher</title>'
    return '\n'.join([head, title, '<defs>', tip(GREY), tip(GREEN), '</defs>', *parts, '</svg>'])+'\n'


if __name__=='__main__':
    file = Path(__file__).parent.parent/'nbs'/'images'/'teaching.svg'
    file.write_text(drawing(), encoding='utf-8')
