// What a reader would see go wrong on a page that is laid out: lists of words, empty where all is well.
(() => {
const blocks = 'p,li,td,th,h1,h2,h3,h4,h5,h6,pre,figcaption,summary,dt,dd,button,div,blockquote,a,header,nav,main,aside,figure,svg'
const short = s => s.trim().replace(/\s+/g, ' ').slice(0, 50)
const scrolls = e => /auto|scroll/.test(getComputedStyle(e).overflowX)
const within = (a, b) => ({left: Math.max(a.left, b.left), right: Math.min(a.right, b.right), top: Math.max(a.top, b.top), bottom: Math.min(a.bottom, b.bottom)})
const meet = (a, b, by) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > by && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > by
const forEars = e => { const s = getComputedStyle(e); return s.position === 'absolute' && (/^rect\(0|^rect\(1px, 1px/.test(s.clip) || s.clipPath === 'inset(50%)') }
const drawn = e => {   // and not there for screen readers alone
  if (!e.checkVisibility({opacityProperty: true, visibilityProperty: true, contentVisibilityAuto: true})) return false
  for (let x = e; x; x = x.parentElement) if (forEars(x)) return false
  return true
}
const words = root => {   // text nodes that are drawn
  const found = [], walk = document.createTreeWalker(root, NodeFilter.SHOW_TEXT)
  for (let n; n = walk.nextNode();) if (n.data.trim() && !n.parentElement.closest('script,style,annotation,template') && drawn(n.parentElement)) found.push(n)
  return found
}

function wide() {
  const e = document.documentElement
  return e.scrollWidth > e.clientWidth ? [`the page is ${e.scrollWidth} wide, the screen ${e.clientWidth}`] : []
}
function clipped() {
  return [...document.body.querySelectorAll('*')].filter(e => {
    if (e instanceof SVGElement || !e.textContent.trim() || !e.clientWidth || !drawn(e)) return false
    const s = getComputedStyle(e), cut = o => o === 'hidden' || o === 'clip'
    return cut(s.overflowX) && e.scrollWidth > e.clientWidth + 1 || cut(s.overflowY) && e.scrollHeight > e.clientHeight + 2
  }).map(e => `cut off: ${e.tagName.toLowerCase()} ${short(e.textContent)}`)
}
function sideways() {   // tables of parameters and code are read from top to bottom, a figure is seen at once
  return [...document.querySelectorAll('.params .scroll, pre:not(.cell-output *), figure .scroll:has(> img)')].filter(e => e.scrollWidth > e.clientWidth + 1).map(e => `scrolls sideways: ${short(e.textContent || e.firstElementChild.alt)}`)
}
function askew() {   // captions and notes begin where the box begins that they belong to
  const edge = e => { const s = getComputedStyle(e); return e.getBoundingClientRect().left + parseFloat(s.borderLeftWidth) + parseFloat(s.paddingLeft) }
  return [...document.querySelectorAll('figcaption, caption, figure p, .callout > p')].filter(e => e.textContent.trim() && drawn(e)).filter(e => {
    const r = document.createRange(); r.selectNodeContents(e)
    const first = Math.min(...[...r.getClientRects()].filter(c => c.width).map(c => c.left))
    return Math.abs(first - edge(e.closest(e.matches('caption') ? 'table' : 'figure, .callout'))) > 2
  }).map(e => `does not begin at the left: ${short(e.textContent)}`)
}
function overlapping() {   // words of two blocks on each other
  const boxes = []
  for (const n of words(document.querySelector('main') ?? document.body)) {
    const r = document.createRange(); r.selectNodeContents(n)
    let view = null
    for (let e = n.parentElement; e; e = e.parentElement) if (scrolls(e)) { view = e.getBoundingClientRect(); break }
    for (const c of r.getClientRects()) {
      const b = view ? within(c, view) : c
      if (b.right - b.left > 2 && b.bottom - b.top > 2) boxes.push({left: b.left, right: b.right, top: b.top, bottom: b.bottom, n, block: n.parentElement.closest(blocks)})
    }
  }
  boxes.sort((a, b) => a.top - b.top)
  const found = []
  boxes.forEach((a, i) => {
    for (let j = i + 1; j < boxes.length && boxes[j].top < a.bottom; j++) {
      const b = boxes[j]
      if (a.block !== b.block && !a.block.contains(b.block) && !b.block.contains(a.block) && meet(a, b, 3)) found.push(`overlap: ${short(a.n.data)} / ${short(b.n.data)}`)
    }
  })
  return found.slice(0, 5)
}
async function images() {
  const all = [...document.images]
  for (const i of all) i.loading = 'eager'
  await Promise.all(all.map(i => i.decode().catch(() => 0)))
  return all.filter(i => !i.naturalWidth).map(i => `no image: ${i.getAttribute('src').slice(0, 80)}`)
}
function rgb(c) { const v = c.match(/[\d.]+/g).map(Number); return {c: v.slice(0, 3), a: v[3] ?? 1} }
const over = (top, back) => top.c.map((x, i) => x * top.a + back[i] * (1 - top.a))
function light(c) { return c.map(x => (x /= 255) <= .04045 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4).reduce((s, x, i) => s + x * [.2126, .7152, .0722][i], .05) }
function pale() {   // WCAG 2: 4.5 for text, 3 for large text
  const found = new Map()
  for (const n of words(document.body)) {
    const e = n.parentElement, s = getComputedStyle(e), layers = []
    if (e.closest('svg')) continue   // a figure is looked at by itself
    for (let x = e; x; x = x.parentElement) { const b = rgb(getComputedStyle(x).backgroundColor); if (b.a) layers.unshift(b) }
    const back = layers.reduce((b, l) => over(l, b), [255, 255, 255]), ink = over(rgb(s.color), back)
    const [a, b] = [light(ink), light(back)], size = parseFloat(s.fontSize), large = size >= 24 || size >= 18.66 && s.fontWeight >= 700
    const ratio = Math.max(a, b) / Math.min(a, b)
    if (ratio < (large ? 3 : 4.5)) found.set(`${s.color} ${back}`, `contrast ${ratio.toFixed(2)}: ${s.color} on ${back.map(Math.round)}: ${short(n.data)}`)
  }
  return [...found.values()]
}
function figure(svg) {   // text that the edge cuts off, or that lies on other text
  const frame = svg.getBoundingClientRect(), found = [], boxes = []
  for (const t of svg.querySelectorAll('text')) {
    const angle = Math.abs(Number(/rotate\((-?[\d.]+)/.exec(t.getAttribute('transform') ?? '')?.[1] ?? 0)), r = t.getBoundingClientRect()
    if (!r.width || !t.textContent.trim()) continue
    if (r.left < frame.left - 1 || r.right > frame.right + 1 || r.top < frame.top - 2 || r.bottom > frame.bottom + 2) found.push(`beyond the edge: ${short(t.textContent)}`)
    if (angle % 90) continue   // its box says little
    const slim = angle % 180 ? {x: .22, y: .02} : {x: .02, y: .22}   // glyphs do not fill the height of a line
    boxes.push({left: r.left + slim.x * r.width, right: r.right - slim.x * r.width, top: r.top + slim.y * r.height, bottom: r.bottom - slim.y * r.height, text: short(t.textContent)})
  }
  boxes.forEach((a, i) => { for (const b of boxes.slice(i + 1)) if (meet(a, b, 1.5)) found.push(`overlap: ${a.text} / ${b.text}`) })
  return found.slice(0, 5)
}
window.look = {
  layout: async () => { for (const d of document.querySelectorAll('details')) d.open = true; return [...await images(), ...wide(), ...clipped(), ...sideways(), ...askew(), ...overlapping()] },
  pale, figures: () => Object.fromEntries([...document.querySelectorAll('svg')].map(s => [s.dataset.name, figure(s)]).filter(([, f]) => f.length))}
})()
