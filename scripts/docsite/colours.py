"Saved figures in the colours of the page that they are on."
import re

from switchable_llm.study.figures import ON_PAGE

def rules(k, strict):
    "CSS of the light (0) or dark (1) colours; `strict` leaves areas as they are."
    for saved,on_page in ON_PAGE.items():
        areas = 'text'*strict
        yield f'{areas}[fill="{saved.lower()}"]{{fill:{on_page[k]}}}[stroke="{saved.lower()}"]{{stroke:{on_page[k]}}}'

def themed(svg):
    """A figure that follows the theme: matplotlib's SVG has one grey and one palette for all pages, too pale for text. White
    words stand on areas that were coloured for them, so these stay."""
    strict = 'fill="#ffffff"' in ''.join(re.findall('<text[^>]*>', svg))
    light,dark = (''.join(rules(k, strict)) for k in (0, 1))
    style = f'<style>{light}@media (prefers-color-scheme:dark){{{dark}}}</style>'
    return re.sub('<svg[^>]*>', lambda m: m[0]+style, svg, count=1)
