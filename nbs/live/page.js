// The page around model.js: a question, the bits of each layer, the answer, what it takes. All of its state is in the address.
'use strict'
const $ = id => document.getElementById(id)
const make = (tag, props, ...children) => { const e = Object.assign(document.createElement(tag), props); e.append(...children); return e }
const percent = p => p >= .995 ? (p === 1 || p >= .9995 ? '100 %' : '> 99 %') : p < .01 ? '< 1 %' : `${Math.round(100 * p)} %`
const NAMES = {attn_qkv: 'attention in', attn_out: 'attention out', mlp_in: 'MLP in', mlp_out: 'MLP out'}
const SITE_NAMES = Object.keys(NAMES), ACTS = [2, 3, 4, 5, 6, 7, 8, null]
const QUESTIONS = window.QUESTIONS ?? []

let model, bits, best = {}, moved = {from: 0, to: 0}, at = 0, scheduled = false, notice = ''
try { best = JSON.parse(localStorage.getItem('live-best')) ?? {} } catch {}

function say(text) { $('error').textContent = text; $('error').hidden = !text }

// ---- bits, and the address ----

const cells = () => bits.flatMap(row => SITE_NAMES.map(s => row[s]))
const equal = (x, y) => JSON.stringify(x) === JSON.stringify(y)
const fits = p => p.flatMap(Object.values).every(b => b.w !== null && model.widths.includes(b.w) && ACTS.includes(b.a))
const profiles = () => model.d.profiles.map(p => [p.name, model.profile(p)]).filter(([, b]) => fits(b))
const named = () => profiles().find(([, b]) => equal(b, bits))?.[0]
const write = kind => bits.map(row => SITE_NAMES.map(s => row[s][kind] ?? 'f').join('')).join('.')

function toAddress() {
  const p = new URLSearchParams(), name = named()
  if ($('own').open) { p.set('question', $('own-question').value); p.set('context', $('own-context').value) } else p.set('q', at + 1)
  if (name) p.set('p', name)
  else { p.set('w', write('w')); p.set('a', write('a')) }
  if (moved.from || moved.to < bits.length - 1) p.set('layers', `${moved.from}-${moved.to}`)
  history.replaceState(null, '', `#${p}`)
}
function fromAddress() {
  const p = new URLSearchParams(location.hash.slice(1)), last = model.blocks.length - 1
  let wanted = profiles().find(([name]) => name === p.get('p'))?.[1]
  if (p.has('w')) {
    const w = p.get('w').split('.'), a = (p.get('a') ?? '').split('.')
    const read = (rows, i, j) => rows[i]?.[j] === 'f' ? null : Number(rows[i]?.[j])
    const cell = (i, j) => ({w: read(w, i, j), a: read(a, i, j)})
    const found = model.blocks.map((_, i) => Object.fromEntries(SITE_NAMES.map((s, j) => [s, cell(i, j)])))
    if (w.length === found.length && fits(found)) wanted = found
  }
  const lost = (p.has('w') || p.has('p')) && !wanted
  notice = lost ? 'The bits in this link do not fit the model: it starts at its first profile.' : ''
  bits = structuredClone(wanted ?? profiles()[0]?.[1] ?? refuse('none of its profiles has bits that this page can show'))
  const [a, b] = (p.get('layers') ?? '').split('-').map(x => parseInt(x, 10))
  moved = a >= 0 && b >= a && b <= last ? {from: a, to: b} : {from: 0, to: last}
  const q = Math.trunc(p.get('q')) - 1
  at = q >= 0 && q < QUESTIONS.length ? q : 0
  showQuestion()
  $('own').open = p.has('question')
  if (p.has('question')) { $('own-question').value = p.get('question'); $('own-context').value = p.get('context') ?? '' }
}

// ---- what is asked ----

function asked() {
  return $('own').open ? {question: $('own-question').value.trim(), context: $('own-context').value.trim()} : QUESTIONS[at]
}
function showQuestion() {
  const q = QUESTIONS[at]
  $('question').value = at; $('context').textContent = q.context
  $('own-question').value = q.question; $('own-context').value = q.context
  $('par-text').textContent = ''
}
function choose(i) { $('own').open = false; at = (i + QUESTIONS.length) % QUESTIONS.length; showQuestion(); change() }

// ---- the answer ----

const level = p => p >= .9 ? 'sure' : p >= .6 ? 'likely' : p >= .3 ? 'unsure' : 'guess'
const piece = i => model.tokenizer.words[i].replace('\n', '↵').trim() || '␣'

function answer(q, b) {   // {pieces, words: [[text, probability]], text, ms}
  const start = performance.now(), ids = model.tokenizer.encode(promptOf(q.question, q.context))
  const pieces = model.greedy(ids, b), words = []
  for (const t of pieces) {
    const text = model.tokenizer.words[t.id]
    if (text.includes('\n') || model.tokenizer.special.includes(text)) break
    if (text.startsWith(' ') || !words.length) words.push([text.trim(), t.probability])
    else words[words.length - 1] = [words[words.length - 1][0] + text, words[words.length - 1][1] * t.probability]
  }
  const unknown = ids.includes(model.tokenizer.unknown), text = words.map(w => w[0]).join(' ')
  return {pieces, words, text, unknown, ms: performance.now() - start}
}
function showAnswer() {
  const q = asked(), a = answer(q, bits)
  const word = ([text, p]) => make('span', {className: `word ${level(p)}`}, text, ' ', make('small', {}, percent(p)))
  $('answer').replaceChildren(...a.words.flatMap(w => [word(w), ' ']))
  if (!a.words.length) $('answer').textContent = '(nothing)'
  const right = q.answer !== undefined && a.text === q.answer, v = $('verdict')
  v.className = q.answer === undefined ? '' : right ? 'right' : 'wrong'
  if (q.answer === undefined) v.textContent = a.unknown ? 'Some letters are unknown to the model.' : ''
  else v.textContent = right ? '✓ Right.' : `✗ Wrong: it is ${q.answer}.`
  const row = ({id, probability: p, others}) => make('tr', {},
    make('th', {scope: 'row'}, make('span', {className: `word ${level(p)}`}, piece(id))),
    make('td', {className: 'number'}, `${percent(p)}, ${level(p)}`),
    make('td', {}, others.filter(o => o[1] >= .005).map(([i, p]) => `${piece(i)} (${percent(p)})`).join(', ') || 'nothing'))
  $('pieces').tBodies[0].replaceChildren(...a.pieces.map(row))
  $('time').textContent = `Answered in ${Math.max(1, Math.round(a.ms))} ms on this machine.`
  return right
}

// ---- bits on the screen ----

function span(values) {   // bits of several layers in words
  const all = [...new Set(values.filter(v => v !== null))].sort(), float = values.includes(null) ? ['float'] : []
  const some = all.length ? [`${all[0]}${all.length > 1 ? `–${all.at(-1)}` : ''} bits`] : []
  return [...some, ...float].join(', ')
}
function slider(id, text, options, kind, sites) {
  const input = make('input', {type: 'range', id, min: 0, max: options.length - 1, step: 1})
  input.oninput = () => {
    for (let i = moved.from; i <= moved.to; i++) for (const s of sites) bits[i][s][kind] = options[input.value]
    change()
  }
  const row = make('div', {className: `slider ${id}`}, make('label', {htmlFor: id}, text), input, make('output', {htmlFor: id}))
  row.update = () => {
    const values = bits.slice(moved.from, moved.to + 1).flatMap(b => sites.map(s => b[s][kind]))
    const words = span(values)
    input.value = Math.max(...values.map(v => options.indexOf(v)))
    input.setAttribute('aria-valuetext', words); row.lastChild.textContent = words
  }
  return row
}
function build() {
  $('question').replaceChildren(...QUESTIONS.map((q, i) => make('option', {value: i}, `${i + 1}. ${q.question}`)))
  const names = [...profiles().map(([name]) => [name, name]), ['', 'your own mix']]
  $('profile').replaceChildren(...names.map(([value, text]) => make('option', {value}, text)))
  for (const id of ['from', 'to']) $(id).replaceChildren(...model.blocks.map((_, i) => make('option', {value: i}, i)))
  $('sliders').replaceChildren(slider('all', 'all weights', model.widths, 'w', SITE_NAMES),
    ...SITE_NAMES.map(s => slider(s, NAMES[s], model.widths, 'w', [s])), slider('act', 'activations', ACTS, 'a', SITE_NAMES))
  const heads = ['layer', ...SITE_NAMES.map(s => NAMES[s])]
  $('map').tHead.replaceChildren(make('tr', {}, ...heads.map(text => make('th', {scope: 'col'}, text))))
}
function showBits() {
  $('profile').value = named() ?? ''; $('from').value = moved.from; $('to').value = moved.to
  for (const row of $('sliders').children) row.update()
  $('map').tBodies[0].replaceChildren(...bits.map((row, i) => {
    const tds = SITE_NAMES.map(s => {
      const {w, a} = row[s], td = make('td', {}, a === null ? `w${w}` : `w${w}a${a}`)
      td.style.setProperty('--share', w * (a ?? 16) / 128)
      return td
    })
    return make('tr', {className: i >= moved.from && i <= moved.to ? 'moved' : ''}, make('th', {scope: 'row'}, i), ...tds)
  }))
}

// ---- what it takes, and the game ----

const shareOf = b => { const c = model.cost(b); return c.bops / c.floatBops }
function showCost() {
  const c = model.cost(bits), bytes = c.bytes / c.floatBytes, bops = c.bops / c.floatBops
  const millions = (x, digits) => (x / 1e6).toFixed(digits)
  const memory = `${millions(c.bytes, 2)} MB, ${percent(bytes)} of float's ${millions(c.floatBytes, 2)} MB`
  const work = `${millions(c.bops, 1)} million bit-operations per token, ${percent(bops)} of float's ${millions(c.floatBops, 0)}`
  $('bytes-text').textContent = `Memory, adapters included: ${memory}`; $('bops-text').textContent = `Work, adapters included: ${work}`
  $('bytes-bar').style.width = `${100 * bytes}%`; $('bops-bar').style.width = `${100 * bops}%`
}
const key = () => $('own').open ? null : `${model.mark} ${QUESTIONS[at].context} ${QUESTIONS[at].question}`
const tenths = x => `${(100 * x).toFixed(1)} %`
function play(right) {
  const k = key(), share = shareOf(bits)
  if (k && right && !(best[k]?.share <= share)) {
    best[k] = {share, bits: structuredClone(bits)}
    try { localStorage.setItem('live-best', JSON.stringify(best)) } catch {}
  }
  const mine = Object.entries(best).filter(([k]) => k.startsWith(`${model.mark} `)).map(([, b]) => b.share)
  const mean = mine.reduce((x, y) => x + y, 0) / mine.length
  $('best').textContent = !k ? 'It is played on the questions of the list.'
    : (best[k] ? `Your best here: ${tenths(best[k].share)} of float's.` : 'No right answer here yet.')
      + (mine.length > 1 ? ` On the ${mine.length} questions you answered: ${tenths(mean)} on average.` : '')
  $('back').disabled = !k || !best[k] || equal(best[k].bits, bits)
}
async function par() {   // the same bits for all layers, the cheapest first
  const everywhere = b => model.blocks.map(() => Object.fromEntries(SITE_NAMES.map(s => [s, b])))
  const q = asked(), all = model.widths.flatMap(w => ACTS.map(a => everywhere({w, a})))
  all.sort((x, y) => shareOf(x) - shareOf(y))
  $('par').disabled = true
  for (const [i, b] of all.entries()) {
    $('par-text').textContent = `Trying ${i + 1} of ${all.length} …`
    await new Promise(done => setTimeout(done))
    if (!equal(asked(), q)) { $('par-text').textContent = ''; break }
    if (answer(q, b).text !== q.answer) continue
    const {w, a} = b[0].mlp_in
    const name = a === null ? `w${w}` : `w${w}a${a}`
    const found = `Of bits that are the same everywhere, ${name} is the cheapest that answers: ${tenths(shareOf(b))} of float's.`
    $('par-text').textContent = `${found} Dearer ones may fail, and a mix may do with less.`
    break
  }
  $('par').disabled = false
  if ($('par-text').textContent.startsWith('Trying')) $('par-text').textContent = 'No bits that are the same everywhere answer this one.'
}

// ---- all of it ----

function update() {
  scheduled = false
  showBits(); showCost()
  try { play(showAnswer()); say(notice) }
  catch (e) { say(e.message); $('answer').textContent = '–'; $('verdict').textContent = ''; $('pieces').tBodies[0].replaceChildren() }
  toAddress()
  $('par').disabled = $('own').open
  performance.mark('answered')   // what the test waits for
}
function later() { if (!scheduled) { scheduled = true; setTimeout(update) } }
function change() { notice = ''; later() }

async function bytesOfModel() {   // a page that was opened as a file may not fetch, only load scripts
  if (location.protocol !== 'file:') {
    const r = await fetch('tiny.safetensors')
    if (!r.ok) refuse(`tiny.safetensors: the server says ${r.status}`)
    return r.arrayBuffer()
  }
  await new Promise((done, failed) => {
    const lost = () => failed(new Error('tiny.js is not there'))
    document.head.append(make('script', {src: 'tiny.js', onload: done, onerror: lost}))
  })
  return Uint8Array.from(atob(window.PACKED), c => c.charCodeAt(0)).buffer
}
function open(buffer, name) {
  const before = model, start = performance.now()
  try {
    model = new Model(buffer)
    model.mark = [...JSON.stringify(model.d.checksums)].reduce((h, c) => Math.imul(31, h) + c.charCodeAt(0) | 0, 0)
    fromAddress()
  } catch (e) { model = before; throw e }
  build(); showQuestion(); fromAddress()
  const size = (buffer.byteLength / 1e6).toFixed(1), ms = Math.round(performance.now() - start), widths = model.widths.join(', ')
  $('status').textContent = `${name}: ${size} MB, ${model.blocks.length} layers, weights of ${widths} bits, read in ${ms} ms.`
  $('app').hidden = false
  update()
  unpackAll(model)
}
async function unpackAll(m) {   // ahead of the sliders, in the pauses
  for (const w of m.widths) for (const b of m.blocks) for (const s of SITE_NAMES) {
    await new Promise(done => setTimeout(done))
    if (m !== model) return
    if (w <= b[s].stored) b[s].codes(w)
  }
}
async function begin() {
  if (!QUESTIONS.length) return say('The page has no questions.js: it is made with the site, by scripts/build_docs.py.')
  try { open(await bytesOfModel(), 'tiny.safetensors') }
  catch (e) {
    $('status').textContent = ''
    say(`The model could not be loaded: ${e.message}. scripts/build_docs.py makes it with the site; or open a file of your own below.`)
    $('other').open = true
  }
}

$('theme').onclick = () => {
  const root = document.documentElement
  root.dataset.theme = getComputedStyle(root).colorScheme === 'dark' ? 'light' : 'dark'
  try { localStorage.setItem('theme', root.dataset.theme) } catch {}
}
$('question').onchange = e => choose(Number(e.target.value))
$('before').onclick = () => choose(at - 1)
$('next').onclick = () => choose(at + 1)
$('profile').onchange = e => {
  const p = profiles().find(([name]) => name === e.target.value)
  if (p) bits = structuredClone(p[1])
  change()
}
$('from').onchange = e => { moved.from = Number(e.target.value); moved.to = Math.max(moved.to, moved.from); change() }
$('to').onchange = e => { moved.to = Number(e.target.value); moved.from = Math.min(moved.to, moved.from); change() }
$('own').ontoggle = () => { if (model) change() }
$('own-question').oninput = $('own-context').oninput = () => change()
$('back').onclick = () => { bits = structuredClone(best[key()].bits); change() }
$('par').onclick = par
$('file').onchange = async e => {
  const file = e.target.files[0]
  if (!file) return
  try { open(await file.arrayBuffer(), file.name) }
  catch (err) { say(`${file.name}: ${err.message}.${model ? ' The model before it is still here.' : ''}`) }
}
window.onhashchange = () => { if (model) { fromAddress(); later() } }
begin()
