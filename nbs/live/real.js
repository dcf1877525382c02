// The trained real model: its answers were written down when the record was made; nothing is computed here but what is shown.
// `ANSWERS` (answers.js) is what scripts/docsite/live.py takes of the record; `make`, `level` and `percent` are page.js's.

const MEGA = 1e6, GIGA = 1e9
const REAL = window.ANSWERS   // not there, or null, without a record
const order = Object.keys(REAL?.costs ?? {}).sort((a, b) => REAL.costs[b].bops - REAL.costs[a].bops)

function wordsOf(pieces) {   // [[word, probability]]: a piece that begins with a space begins a word
  const words = []
  for (const [text, p] of pieces) {
    if (text.startsWith(' ') || !words.length) words.push([text.trim(), p])
    else words[words.length - 1] = [words[words.length - 1][0] + text, words[words.length - 1][1] * p]
  }
  return words.filter(([w]) => w)
}
const rightOf = name => REAL.questions.filter(q => q.said[name].em).length
const coloured = ([text, p]) => make('span', {className: `word ${level(p)}`}, text, ' ', make('small', {}, percent(p)))

function showReal() {
  const q = REAL.questions[$('real-question').value]
  $('real-context').textContent = q.context
  const mark = s => s.em ? ['right', '✓ right'] : s.f1 > 0 ? ['', '≈ shares words'] : ['wrong', '✗ wrong']
  $('real-answers').tBodies[0].replaceChildren(...order.map(name => {
    const said = q.said[name], cost = REAL.costs[name], words = wordsOf(said.words), [kind, text] = mark(said)
    return make('tr', {},
      make('th', {scope: 'row'}, name === 'float' ? 'float, untrained' : name),
      make('td', {className: 'said'}, ...words.length ? words.flatMap(w => [coloured(w), ' ']) : ['(nothing)']),
      make('td', {className: kind}, text),
      make('td', {className: 'number'}, `${Math.round(cost.bytes / MEGA)} MB`),
      make('td', {className: 'number'}, `${(cost.bops / GIGA).toFixed(1)} GBOPs`),
      make('td', {className: 'number'}, `${rightOf(name)} of ${REAL.questions.length} right`))
  }))
  $('real-truth').textContent = `It counts as right: ${q.answers.join('; or ')}.`
}

if (REAL) {
  $('real-question').replaceChildren(...REAL.questions.map((q, i) => make('option', {value: i}, `${i + 1}. ${q.question}`)))
  $('real-question').onchange = showReal
  const turn = step => () => {
    const n = REAL.questions.length
    $('real-question').value = (Number($('real-question').value) + step + n) % n
    showReal()
  }
  $('real-before').onclick = turn(-1)
  $('real-next').onclick = turn(1)
  $('real-how').textContent = REAL.how
  $('real-which').textContent = REAL.which
  $('real').hidden = false
  showReal()
}
