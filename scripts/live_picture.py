"""Write `nbs/live/live.gif`, the moving picture of the README: one question on the live page, at fewer and fewer bits.
Needs Chromium and playwright; trains the page's model first, which takes a minute."""
import io, shutil, tempfile
from pathlib import Path
from docsite import live
from PIL import Image
from playwright.sync_api import sync_playwright

QUESTION,PROFILES = 6,('bw8', 'bw6', 'w4a8', 'bw4', 'w3a6', 'w2a8')
SECONDS,LAST = 1.6,3.
STYLE = """header, h1, .lead, #status, footer, #other, #own, .game, .legend, .row:has(#from), #before, #next, [for=question], #map, #time
  { display: none !important } main { padding: .5rem !important; } section { margin: .4rem 0 !important; }"""

def frames(page):
    "A picture of each profile."
    page.add_style_tag(content=STYLE)
    for name in PROFILES:
        page.evaluate('at => { location.hash = at }', f'q={QUESTION}&p={name}')
        page.wait_for_timeout(800)
        yield Image.open(io.BytesIO(page.locator('#app').screenshot())).convert('RGB')

def main():
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as p:
        live.write(Path(folder)/live.NAME)
        browser = p.chromium.launch(executable_path=shutil.which('chromium'), args=['--no-sandbox'])
        page = browser.new_page(viewport=dict(width=880, height=700), color_scheme='light')
        page.goto((Path(folder)/live.NAME/'index.html').as_uri())
        page.wait_for_selector('#answer .word')
        shots = list(frames(page))
        browser.close()
    size = tuple(map(max, zip(*(s.size for s in shots))))   # a longer answer makes a page longer
    canvas = []
    for s in shots:
        canvas.append(Image.new('RGB', size, 'white'))
        canvas[-1].paste(s)
    every = Image.new('RGB', (size[0], size[1]*len(canvas)))
    for i,c in enumerate(canvas): every.paste(c, (0, i*size[1]))
    colours = every.quantize(96)
    first,*rest = [c.quantize(palette=colours, dither=Image.Dither.NONE) for c in canvas]
    waits = [int(1000*SECONDS)]*len(rest)+[int(1000*LAST)]
    first.save(live.FOLDER/'live.gif', save_all=True, append_images=rest, duration=waits, loop=0, optimize=True)

if __name__=='__main__': main()
