// Theme, chapters on a narrow screen, tabs, copy buttons and search. Needs no server and no network.
const $ = id => document.getElementById(id), root = document.documentElement
const make = (tag, props) => Object.assign(document.createElement(tag), props)

$('theme').onclick = () => {
  const dark = getComputedStyle(root).colorScheme === 'dark'
  root.dataset.theme = dark ? 'light' : 'dark'
  try { localStorage.setItem('theme', root.dataset.theme) } catch {}
}
$('menu').onclick = e => e.currentTarget.setAttribute('aria-expanded', $('sidebar').classList.toggle('open'))
const side = $('sidebar'), here = side.querySelector('[aria-current]')
if (here) side.scrollTop = here.offsetTop - side.clientHeight / 2

for (const set of document.querySelectorAll('.panel-tabset')) {
  const panels = [...set.querySelectorAll(':scope > .tab')], list = make('div', {className: 'tab-list', role: 'tablist'})
  const show = k => panels.forEach((p, i) => {
    p.hidden = i !== k
    list.children[i].setAttribute('aria-selected', i === k)
    list.children[i].tabIndex = i === k ? 0 : -1
  })
  panels.forEach((p, i) => {
    const title = p.querySelector('.tab-title'), button = make('button', {type: 'button', role: 'tab', textContent: title.textContent.trim(), onclick: () => show(i)})
    title.hidden = true; p.role = 'tabpanel'; p.ariaLabel = button.textContent
    list.append(button)
  })
  list.onkeydown = e => {
    const step = {ArrowRight: 1, ArrowLeft: -1}[e.key], k = (panels.findIndex(p => !p.hidden) + step + panels.length) % panels.length
    if (step) { show(k); list.children[k].focus() }
  }
  set.prepend(list); show(0)
}

for (const block of document.querySelectorAll('div.sourceCode')) {
  const button = make('button', {type: 'button', className: 'copy', textContent: 'Copy'})
  button.onclick = () => navigator.clipboard?.writeText(block.querySelector('code').textContent).then(() => button.textContent = 'Copied')
  block.append(button)
}

// What goes on beyond the right edge of its box fades out there, until one has scrolled to its end.
const more = e => {
  e.classList.toggle('more', e.scrollWidth - e.clientWidth - e.scrollLeft > 2)
  if (e.scrollWidth - e.clientWidth > 2) e.tabIndex = 0   // so that keys scroll it
}
const sizes = new ResizeObserver(changes => changes.forEach(c => more(c.target)))
for (const e of document.querySelectorAll('.scroll, main pre')) { sizes.observe(e); e.addEventListener('scroll', () => more(e), {passive: true}) }

// Search: every word of the query must begin a word of the section; titles count more, and of those recipes.
const words = s => s.toLowerCase().normalize('NFKD').match(/[\p{L}\p{N}]+/gu) ?? []
const load = () => window.SEARCH ? Promise.resolve() : new Promise(done => document.head.append(make('script', {src: root.dataset.root + 'search.js', onload: done})))
const starts = (text, q) => text.some(w => w.startsWith(q))
function find(query) {
  const qs = words(query)
  if (!qs.length) return []
  return window.SEARCH.map(s => {
    s.titleWords ??= words(s.title); s.pageWords ??= words(s.page); s.textWords ??= words(s.text)
    if (!qs.every(q => starts(s.titleWords, q) || starts(s.pageWords, q) || starts(s.textWords, q))) return null
    const whole = s.titleWords.join('') === qs.join('') ? 20 : s.recipe && qs.every(q => starts(s.titleWords, q)) ? 15 : 0
    return {s, score: whole + qs.reduce((n, q) => n + 5 * starts(s.titleWords, q) + 2 * starts(s.pageWords, q) + starts(s.textWords, q), 0)}
  }).filter(Boolean).sort((a, b) => b.score - a.score).slice(0, 12)
}
function excerpt(text, q) {
  const at = text.toLowerCase().search(new RegExp('(?<![\\p{L}\\p{N}])' + q, 'u')), from = Math.max(0, at - 50), el = make('small')
  if (at < 0) el.append(text.slice(0, 150))
  else el.append((from ? '…' : '') + text.slice(from, at), make('mark', {textContent: text.slice(at, at + q.length)}), text.slice(at + q.length, at + 110))
  if (text.length > from + 150) el.append('…')
  return el
}
async function search() {
  const query = $('page-search').value, box = $('found')
  box.hidden = !words(query).length
  if (box.hidden) return
  await load()
  if (query !== $('page-search').value) return
  const hits = find(query)
  box.replaceChildren(...hits.map(({s}) => {
    const a = make('a', {href: root.dataset.root + s.href})
    a.append(make('strong', {textContent: s.title}), s.title.startsWith(s.page) ? '' : ' · ' + s.page, excerpt(s.text, words(query)[0]))
    return a
  }))
  if (!hits.length) box.append(make('p', {textContent: `Nothing found for “${query}”.`}))
}
$('page-search').oninput = search
$('page-search').onfocus = () => { load(); search() }
document.addEventListener('click', e => { if (!e.target.closest('.search') || e.target.closest('#found a')) $('found').hidden = true })
document.addEventListener('keydown', e => {
  if (e.key === 'Escape') { $('found').hidden = true; $('sidebar').classList.remove('open'); $('menu').setAttribute('aria-expanded', false) }
  if (e.key === '/' && !e.target.closest('input, textarea')) { e.preventDefault(); $('page-search').focus() }
  if (e.key === 'Enter' && e.target === $('page-search')) $('found').querySelector('a')?.click()
  const links = [...$('found').querySelectorAll('a')], step = {ArrowDown: 1, ArrowUp: -1}[e.key]
  if (step && !$('found').hidden && e.target.closest('.search')) { e.preventDefault(); (links[links.indexOf(e.target) + step] ?? $('page-search')).focus() }
})

// The section that is read, in the list on the right.
const entries = new Map([...document.querySelectorAll('#toc a')].map(a => [decodeURIComponent(a.hash.slice(1)), a]))
const seen = new IntersectionObserver(changes => {
  for (const c of changes) if (c.isIntersecting) { for (const a of entries.values()) a.classList.remove('here'); entries.get(c.target.id)?.classList.add('here') }
}, {rootMargin: '-60px 0px -75% 0px'})
for (const id of entries.keys()) if ($(id)) seen.observe($(id))
