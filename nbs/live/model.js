// A packed file of switchable_llm, read and run in plain JavaScript: no library, no build step.
//
// serving/packed_file.ipynb says what the file holds, serving/kernels.ipynb what the planes mean, csrc/ how the numbers are
// added. This adds them in the same order and rounds at the same places (`f` rounds to float32), so it writes the same
// tokens. Integer products are exact: doubles hold all whole numbers up to 2^53.
'use strict'
const f = Math.fround
const nearest = x => (x + 6755399441055744) - 6755399441055744   // to a whole number, ties to even
const refuse = text => { throw new Error(text) }

// ---- the file: a length, a head in JSON, then the bytes of all tensors (safetensors) ----

function floatOfHalf(h) {
  const e = h >> 10 & 31, m = h & 1023, v = e === 31 ? (m ? NaN : Infinity) : e ? (1 + m / 1024) * 2 ** (e - 15) : m * 2 ** -24
  return h >> 15 ? -v : v
}
const TYPES = {   // name -> bytes of a number, and what reads them
  U8: [1, b => new Uint8Array(b)], I32: [4, b => new Int32Array(b)], F32: [4, b => new Float32Array(b)],
  F64: [8, b => Float32Array.from(new Float64Array(b))], F16: [2, b => Float32Array.from(new Uint16Array(b), floatOfHalf)],
  BF16: [2, b => new Float32Array(Uint32Array.from(new Uint16Array(b), h => h << 16).buffer)]}

function readFile(buffer) {   // {d, tensors}: what `freeze` said of the model, and its tensors by name
  const size = buffer.byteLength, n = size < 10 ? NaN : Number(new DataView(buffer).getBigUint64(0, true))
  if (!(n >= 2 && n <= size - 8 && n < 2 ** 25)) refuse('this is no packed file, or it was cut off')
  let entries, d
  try { entries = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, n))) }
  catch { refuse('this is no packed file: its head is no JSON') }
  try { d = JSON.parse(entries.__metadata__.switchable_llm) }
  catch { refuse('a safetensors file, but not one that `freeze` wrote') }
  if (![2, 3].includes(d.format_version)) refuse(`format version ${d.format_version}: this page reads 2 and 3`)
  const tensors = {}
  for (const [name, e] of Object.entries(entries)) {
    if (name === '__metadata__' || name.startsWith('tokenizer.')) continue
    const [bytes, read] = TYPES[e.dtype] ?? refuse(`${name} is of type ${e.dtype}, which this page does not read`)
    const [a, b] = e.data_offsets, numbers = e.shape.reduce((x, y) => x * y, 1)
    if (b - a !== numbers * bytes || 8 + n + b > size) refuse(`the file was cut off, or is damaged: ${name} is not whole`)
    tensors[name] = Object.assign(read(buffer.slice(8 + n + a, 8 + n + b)), {shape: e.shape})
  }
  return {d, tensors}
}

// ---- words to numbers of tokens, and back ----

class Tokenizer {
  constructor(bytes) {
    const t = JSON.parse(new TextDecoder().decode(bytes)), split = t.pre_tokenizer
    const known = t.model.type === 'WordLevel' && split?.type === 'Split' && split.behavior === 'Isolated' && split.pattern.Regex
    if (!known || t.normalizer) refuse('its tokenizer is not the embedded one, and this page reads no other')
    this.special = t.added_tokens.map(a => a.content)
    this.ids = new Map(Object.entries(t.model.vocab))
    this.words = []
    for (const [w, i] of this.ids) this.words[i] = w
    this.unknown = this.ids.get(t.model.unk_token)
    const whole = this.special.map(s => s.replace(/[\\^$.*+?()[\]{}|]/g, '\\$&')).join('|')
    this.pattern = new RegExp(`${whole}|${split.pattern.Regex}`.replaceAll('\\ ', ' '), 'gu')
  }
  encode(text) { return (text.match(this.pattern) ?? []).map(w => this.ids.get(w) ?? this.unknown) }
  decode(ids) { return ids.map(i => this.words[i]).join('') }
}

// ---- sums, in the order of csrc: sixteen lanes, which are then added in pairs ----

const lanes = new Float32Array(64)
function sumLanes() {
  for (let half = 8; half; half >>= 1) for (let i = 0; i < half; i++) lanes[i] += lanes[i + half]
  return lanes[0]
}
function dot(a, ai, b, bi, n) {
  lanes.fill(0, 0, 16)
  for (let i = 0; i < n; i++) lanes[i & 15] = a[ai + i] * b[bi + i] + lanes[i & 15]
  return sumLanes()
}
function wideDot(a, ai, b, bi, n) {   // of a float weight: four times sixteen lanes
  const whole = n - n % 64
  lanes.fill(0)
  for (let i = 0; i < n; i++) { const l = i < whole ? i & 63 : i & 15; lanes[l] = a[ai + i] * b[bi + i] + lanes[l] }
  for (let i = 0; i < 16; i++) lanes[i] = f(lanes[i] + lanes[i + 16]) + f(lanes[i + 32] + lanes[i + 48])
  return sumLanes()
}
const [LOG2E, LN2_UPPER, LN2_LOWER] = [1.44269504, .693359375, -2.1219444e-4].map(f)
const [C7, C6, C5, C4, C3] = [1 / 5040, 1 / 720, 1 / 120, 1 / 24, 1 / 6].map(f), [EXP_LEAST, EXP_MOST] = [-87.3, 88.7].map(f)
const POWERS = Float64Array.from({length: 256}, (_, i) => 2 ** (i - 127))
function exp(x) {   // a polynomial, times a power of two
  x = x < EXP_LEAST ? EXP_LEAST : x > EXP_MOST ? EXP_MOST : x
  const n = nearest(f(x * LOG2E)), r = f(f(x - n * LN2_UPPER) - n * LN2_LOWER)
  let p = f(f(f(C7 * r + C6) * r + C5) * r + C4)
  p = f(f(f(f(p * r + C3) * r + .5) * r + 1) * r + 1)
  return f(p * POWERS[n + 127])
}
const [GELU_CUBE, GELU_SCALE] = [.044715, 2 * f(.7978845608028654)].map(f)
function gelu(g) {   // x/2 (1 + tanh v) = x sigmoid(2v)
  const cube = f(f(g * g) * g), u = f(f(cube * GELU_CUBE + g) * GELU_SCALE)
  return g * f(1 / f(1 + exp(-u)))
}
function layerNorm(x, m, n, [w, b], eps) {
  const y = new Float32Array(m * n)
  for (let t = 0; t < m; t++) {
    const row = x.subarray(t * n, t * n + n), out = y.subarray(t * n, t * n + n)
    lanes.fill(0, 0, 16)
    for (let i = 0; i < n; i++) lanes[i & 15] += row[i]
    const mean = f(sumLanes() / n)
    for (let i = 0; i < n; i++) out[i] = row[i] - mean
    const scale = f(1 / f(Math.sqrt(f(f(dot(out, 0, out, 0, n) / n) + f(eps)))))
    for (let i = 0; i < n; i++) out[i] = f(out[i] * scale) * w[i] + b[i]
  }
  return y
}

// ---- activations ----

function rotate(x, m, n, signs) {   // signs, then sums and differences of neighbours, of pairs, and so on
  const y = new Float32Array(m * n)
  for (let t = 0; t < m; t++) {
    const row = y.subarray(t * n, t * n + n)
    for (let i = 0; i < n; i++) row[i] = x[t * n + i] * signs[i]
    for (let h = 1; h < n; h *= 2) for (let i = 0; i < n; i += 2 * h) for (let j = i; j < i + h; j++) {
      const a = row[j], b = row[j + h]
      row[j] = a + b; row[j + h] = a - b
    }
  }
  return y
}
function rotationSigns(n) {
  if (n & n - 1) refuse(`it rotates ${n} inputs, and this page rotates powers of two`)
  const signs = new Float32Array(n)
  for (let i = 0, s = n; i < n; i++) {
    s = Math.imul(1664525, s) + 1013904223 >>> 0
    signs[i] = (s >= 2 ** 31 ? -1 : 1) * f(n ** -.5)
  }
  return signs
}
function grid(lo, hi, bits, symmetric) {   // step, zero point and the ends of the codes, for numbers from lo to hi
  const top = symmetric ? 2 ** (bits - 1) - 1 : 2 ** bits - 1
  const step = Math.max(f((symmetric ? Math.max(-lo, hi) : f(hi - lo)) / top), f(1.17549435e-38))
  const zero = symmetric ? 0 : Math.min(top, Math.max(0, nearest(f(-lo / step))))
  return {step, inverse: f(1 / step), zero, least: symmetric ? -top : 0, most: top}
}
function floatGrid(big) {   // float activations: whole numbers of 24 bits, in steps of a power of two
  let e = big > 0 ? Math.max(-100, Math.floor(Math.log2(big)) + 1) : -100
  while (big >= 2 ** e) e++
  while (e > -100 && big < 2 ** (e - 1)) e--
  if (big * 2 ** (23 - e) > 8355711) e++
  return {step: 2 ** (e - 23), inverse: 2 ** (23 - e), zero: 0, least: -8355711, most: 8355711}
}
function quantize(x, m, n, act) {   // codes less their zero point, and the grid of each token
  const codes = new Float64Array(m * n), grids = []
  for (let t = 0; t < m; t++) {
    let lo = 0, hi = 0
    for (let i = t * n; i < t * n + n; i++) { if (x[i] < lo) lo = x[i]; if (x[i] > hi) hi = x[i] }
    const g = act.bits === null ? floatGrid(Math.max(-lo, hi)) : grid(...(act.range ?? [lo, hi]), act.bits, act.symmetric)
    for (let i = t * n; i < t * n + n; i++) {
      const c = nearest(f(x[i] * g.inverse)) + g.zero
      codes[i] = (c < g.least ? g.least : c > g.most ? g.most : c) - g.zero
    }
    grids.push(g)
  }
  return {codes, grids}
}

// ---- weights: the first bits of one code ----

class Layer {
  constructor({d, tensors}, name) {
    const l = d.layers.find(x => x.name === name) ?? refuse(`layer ${name} is float in this file`)
    const of = k => tensors[`${l.codes}.${k}`], [n, k] = l.shape
    Object.assign(this, {name, n, k, high: of('high'), middle: of('middle'), low: of('low'), step: of('step'),
      bias: tensors[`${name}.bias`], stored: l.stored, fixed: l.fixed, held: new Map(), adapters: {}, ranges: {}})
    for (const a of l.adapters) {
      const at = ab => tensors[`${name}.adapters.${a.key}.${ab}`]
      this.adapters[a.key] = {a: at('a'), b: at('b'), r: a.r, scaling: f(a.alpha / a.r)}
    }
    for (const b of l.ranges) this.ranges[b] = [...tensors[`${name}.range${b}`]]
    for (const b in this.ranges) this.ranges[b] = [Math.min(0, this.ranges[b][0]), Math.max(0, this.ranges[b][1])]
    const q = d.quantizer
    this.symmetric = q.act_symmetric; this.perToken = q.act === 'per_token'
    this.group = this.step.length > n ? q.group_size : 0
    if (this.group % 16) refuse(`groups of ${this.group} inputs: this page reads multiples of 16`)
    this.signs = l.rotated ? rotationSigns(k) : null
  }
  // Twice the distance from zero of each code, in steps of the eight-bit one: a whole number, whatever the width. Sixteen
  // outputs and four inputs lie together; a unit of sixteen inputs takes 128 bytes of the high plane, which has four bits
  // of a code, and 64 of each of the others.
  codes(bits) {
    if (this.held.has(bits)) return this.held.get(bits)
    const {n, k, high, middle, low} = this, units = Math.ceil(k / 64) * 4, zero = 240 - 2 ** (8 - bits)
    const w = new Float64Array(n * k)
    for (let o = 0, at = 0; o < n; o++) for (let i = 0; i < k; i++, at++) {
      const u = (o >> 4) * units + (i >> 4), v = i >> 2 & 3, place = (o & 15) * 4 + (i & 3)
      let c = (high[u * 128 + (v >> 1) * 64 + place] >> (v & 1) * 4 & 15) << 4
      if (bits > 4) c |= (middle[u * 64 + place] >> 2 * v & 3) << 2
      if (bits > 6) c |= low[u * 64 + place] >> 2 * v & 3
      w[at] = 2 * (c >> 8 - bits << 8 - bits) - zero
    }
    this.held.set(bits, w)
    return w
  }
  row(o, bits) {   // of an embedding: the weight itself
    const {k} = this, w = this.codes(bits), G = this.step.length / this.n
    const step = i => this.step[o * G + (G > 1 ? i / this.group | 0 : 0)]
    return Float32Array.from({length: k}, (_, i) => w[o * k + i] / 2 * step(i))
  }
  // y = x W + bias + the adapter, of m tokens; `b` has weight bits w, activation bits a (null for float), adapter's key.
  run(x, m, b) {
    const {n, k} = this, y = new Float32Array(m * n), out = new Float64Array(m * n)
    const turned = this.signs ? rotate(x, m, k, this.signs) : x
    const range = b.a === null || this.perToken ? null : this.ranges[b.a]
    if (range === undefined) refuse(`${this.name} was never calibrated for a${b.a}`)
    const {codes, grids} = quantize(turned, m, k, {bits: b.a, symmetric: this.symmetric, range})
    if (this.group) this.groups(codes, grids, m, b, y)
    else {
      multiply(this.codes(b.w), codes, n, k, m, out, b.a === null ? Infinity : 2 ** b.a)
      for (let t = 0; t < m; t++) for (let o = 0; o < n; o++) {
        const scale = this.step[o] / 2 * grids[t].step
        y[t * n + o] = scale * out[t * n + o] + (this.bias?.[o] ?? 0)
      }
    }
    const lora = this.adapters[b.key]
    if (lora) for (let t = 0; t < m; t++) for (let j = 0; j < lora.r; j++) {
      const h = f(lora.scaling * dot(lora.a, j * k, x, t * k, k))
      for (let o = 0; o < n; o++) y[t * n + o] = h * lora.b[o * lora.r + j] + y[t * n + o]
    }
    return y
  }
  // Where inputs in groups have steps of their own: the sum of a group is exact, its product with the step a float32. The
  // kernels take the zero point of the activations out at the end, so its part is added here and taken out likewise.
  groups(codes, grids, m, b, y) {
    const {n, k, group, step} = this, G = Math.ceil(k / group), w = this.codes(b.w)
    for (let o = 0; o < n; o++) for (let t = 0; t < m; t++) {
      const g = grids[t], off = !this.symmetric && b.a === 8 ? 128 : 0, zx = b.a === null ? 0 : g.zero - off
      let sum = 0, total = 0
      for (let j = 0; j < G; j++) {
        let s = 0, all = 0
        for (let i = j * group; i < Math.min(k, j * group + group); i++) {
          s += w[o * k + i] * (codes[t * k + i] + zx); all += w[o * k + i]
        }
        sum = f(step[o * G + j] * f(s / 2) + sum)
        total = f(step[o * G + j] * f(all / 2) + total)
      }
      y[t * n + o] = f(g.step) * f(sum - zx * total) + (this.bias?.[o] ?? 0)
    }
  }
}
// y (m,n) = x (m,k) w (n,k)', whole numbers. Where sums stay below 2^25, two tokens share a number: one in its lower 27 bits.
function multiply(w, x, n, k, m, y, most) {
  if (m === 1 || k * 239 * most >= 2 ** 25) return rows(w, x, n, k, m, y)
  const pairs = m >> 1, both = new Float64Array(pairs * k), sums = new Float64Array(pairs * n)
  for (let t = 0; t < pairs; t++) for (let i = 0; i < k; i++) both[t * k + i] = x[2 * t * k + i] + x[(2 * t + 1) * k + i] * 2 ** 27
  rows(w, both, n, k, pairs, sums)
  for (let t = 0; t < pairs; t++) for (let o = 0; o < n; o++) {
    const upper = nearest(sums[t * n + o] / 2 ** 27)
    y[2 * t * n + o] = sums[t * n + o] - upper * 2 ** 27
    y[(2 * t + 1) * n + o] = upper
  }
  if (m & 1) rows(w, x.subarray((m - 1) * k), n, k, 1, y.subarray((m - 1) * n))
}
function rows(w, x, n, k, m, y) {
  let t = 0
  for (; t + 4 <= m; t += 4) for (let o = 0; o < n; o += 2) {   // two outputs of four rows at a time (an odd last one twice)
    const o1 = o + 1 < n ? o + 1 : o
    let a = 0, b = 0, c = 0, d = 0, e = 0, g = 0, h = 0, l = 0
    for (let i = 0, p = o * k, q = o1 * k, x0 = t * k, x1 = x0 + k, x2 = x1 + k, x3 = x2 + k; i < k; i++) {
      const u = w[p + i], v = w[q + i], r0 = x[x0 + i], r1 = x[x1 + i], r2 = x[x2 + i], r3 = x[x3 + i]
      a += u * r0; b += u * r1; c += u * r2; d += u * r3
      e += v * r0; g += v * r1; h += v * r2; l += v * r3
    }
    const at = t * n + o, at1 = t * n + o1
    y[at] = a; y[at + n] = b; y[at + 2 * n] = c; y[at + 3 * n] = d
    y[at1] = e; y[at1 + n] = g; y[at1 + 2 * n] = h; y[at1 + 3 * n] = l
  }
  for (; t < m; t++) for (let o = 0; o < n; o += 4) {   // four outputs of a row (behind the last one, the last one again)
    const p0 = o * k, p1 = Math.min(o + 1, n - 1) * k, p2 = Math.min(o + 2, n - 1) * k, p3 = Math.min(o + 3, n - 1) * k
    let a = 0, b = 0, c = 0, d = 0
    for (let i = 0, q = t * k; i < k; i++) {
      const r = x[q + i]
      a += w[p0 + i] * r; b += w[p1 + i] * r; c += w[p2 + i] * r; d += w[p3 + i] * r
    }
    const last = t * n + n - 1, at = t * n + o
    y[at] = a; y[Math.min(at + 1, last)] = b; y[Math.min(at + 2, last)] = c; y[Math.min(at + 3, last)] = d
  }
}

// ---- the model: GPT-2's shape ----

const SITES = {attn_qkv: 'attn.c_attn', attn_out: 'attn.c_proj', mlp_in: 'mlp.c_fc', mlp_out: 'mlp.c_proj'}

class Model {
  constructor(buffer) {
    const file = readFile(buffer), {d, tensors} = file, c = d.config
    if (d.model_class !== 'GPT2LMHeadModel') refuse(`it holds a ${d.model_class}: this page runs GPT-2's shape`)
    if (!['bits', 'shared', null].includes(d.route)) refuse(`its adapters are routed by '${d.route}': this page knows bits and shared`)
    if (!tensors.tokenizer) refuse('it has no tokenizer: freeze the model with tokenizer=...')
    Object.assign(this, {d, tensors, blocks: [], dim: c.n_embd, heads: c.n_head, context: c.n_positions})
    this.eps = c.layer_norm_epsilon
    this.tokenizer = new Tokenizer(tensors.tokenizer)
    const at = name => tensors[name] ?? refuse(`it has no ${name}`)
    const norm = name => [at(`${name}.weight`), at(`${name}.bias`)]
    for (let i = 0; i < c.n_layer; i++) {
      const b = {norm1: norm(`transformer.h.${i}.ln_1`), norm2: norm(`transformer.h.${i}.ln_2`)}
      for (const s in SITES) b[s] = new Layer(file, `transformer.h.${i}.${SITES[s]}`)
      this.blocks.push(b)
    }
    this.norm = norm('transformer.ln_f')
    const packed = name => d.layers.some(l => l.name === name) ? new Layer(file, name) : null
    this.embedding = packed('transformer.wte') ?? at('transformer.wte.weight')
    this.head = packed('lm_head') ?? tensors['lm_head.weight'] ?? at('transformer.wte.weight')
    this.positions = at('transformer.wpe.weight')
    this.vocabulary = d.layers.find(l => l.name === 'lm_head')?.shape[0] ?? this.head.shape[0]
    const routed = l => d.route === 'bits' && l.adapters.length
    const widths = d.layers.filter(l => l.fixed === null).map(l => routed(l) ? l.adapters.map(a => +a.key) : l.widths)
    this.widths = widths.reduce((a, b) => a.filter(w => b.includes(w))).sort()   // that all layers have, 2 to 8
  }
  setting(bits, layer) {   // bits {w, a}, as the layer takes them
    if (bits.w > layer.stored) refuse(`w${bits.w}: ${layer.name} holds its first ${layer.stored} bits`)
    const key = this.d.route === 'shared' ? 'shared' : String(bits.w)
    const lost = this.d.route === 'bits' && Object.keys(layer.adapters).length && !layer.adapters[key]
    if (lost) refuse(`w${bits.w}: ${layer.name} has no adapter of that width`)
    return {...bits, key}
  }
  profile(p) {   // a profile of the file, or such a mapping -> [block][site] -> {w, a}
    const number = s => s === undefined ? null : Number(s)
    const parse = s => { const m = /^(?:w(\d+))?(?:a(\d+))?$/.exec(s) ?? []; return {w: number(m[1]), a: number(m[2])} }
    return this.blocks.map((_, i) => Object.fromEntries(Object.keys(SITES).map(site => {
      let bits = p.default
      for (const r of p.rules ?? []) {
        if (r.glob) refuse(`profile ${p.name} has a rule by name, which this page does not read`)
        if ((!r.site || r.site.includes(site)) && (!r.layers || r.layers.includes(i))) bits = r.bits
      }
      return [site, parse(bits)]
    })))
  }
  start() {   // an empty cache
    const room = () => new Float32Array(this.context * this.dim)
    return this.blocks.map(() => ({keys: room(), values: room()}))
  }
  embed(ids, pos) {
    const {dim, embedding: e} = this, x = new Float32Array(ids.length * dim)
    ids.forEach((id, t) => {
      const row = e instanceof Layer ? e.row(id, e.fixed) : e.subarray(id * dim, id * dim + dim)
      for (let i = 0; i < dim; i++) x[t * dim + i] = row[i] + this.positions[(pos + t) * dim + i]
    })
    return x
  }
  attention(qkv, m, pos, {keys, values}) {
    const {dim, heads} = this, hd = dim / heads, scale = f(hd ** -.5), y = new Float32Array(m * dim)
    for (let t = 0; t < m; t++) {
      keys.set(qkv.subarray((3 * t + 1) * dim, (3 * t + 2) * dim), (pos + t) * dim)
      values.set(qkv.subarray((3 * t + 2) * dim, (3 * t + 3) * dim), (pos + t) * dim)
    }
    const p = new Float32Array(pos + m)
    for (let t = 0; t < m; t++) for (let h = 0; h < heads; h++) {
      const sees = pos + t + 1, at = h * hd, out = y.subarray(t * dim + at, t * dim + at + hd)
      let top = -Infinity
      for (let s = 0; s < sees; s++) {
        p[s] = scale * dot(qkv, 3 * t * dim + at, keys, s * dim + at, hd)
        if (p[s] > top) top = p[s]
      }
      lanes.fill(0, 0, 16)
      for (let s = 0; s < sees; s++) { p[s] = exp(f(p[s] - top)); lanes[s & 15] += p[s] }
      const inverse = f(1 / sumLanes())
      for (let s = 0; s < sees; s++) for (let i = 0; i < hd; i++) out[i] = p[s] * values[s * dim + at + i] + out[i]
      for (let i = 0; i < hd; i++) out[i] *= inverse
    }
    return y
  }
  // Tokens after the `pos` that the cache holds, at bits [block][site]; the logits after the last one.
  forward(ids, bits, cache, pos = 0) {
    const {dim} = this, m = ids.length, x = this.embed(ids, pos)
    if (pos + m > this.context) refuse(`${pos + m} tokens: the model reads ${this.context}`)
    const add = y => { for (let i = 0; i < x.length; i++) x[i] += y[i] }
    this.blocks.forEach((b, i) => {
      const run = (site, x) => b[site].run(x, m, this.setting(bits[i][site], b[site]))
      add(run('attn_out', this.attention(run('attn_qkv', layerNorm(x, m, dim, b.norm1, this.eps)), m, pos, cache[i])))
      add(run('mlp_out', run('mlp_in', layerNorm(x, m, dim, b.norm2, this.eps)).map(gelu)))
    })
    const last = layerNorm(x.subarray((m - 1) * dim), 1, dim, this.norm, this.eps), {head} = this
    if (head instanceof Layer) return head.run(last, 1, {w: head.fixed, a: null})
    return Float32Array.from({length: this.vocabulary}, (_, o) => wideDot(last, 0, head, o * dim, dim))
  }
  // The likeliest tokens, one by one, until a line ends: [{id, probability, others: [[id, probability], ...]}].
  greedy(ids, bits, most = 10) {
    const cache = this.start(), out = [], {words, special} = this.tokenizer
    const ends = i => words[i].includes('\n') || special.includes(words[i])
    let logits = this.forward(ids, bits, cache)
    for (let pos = ids.length; ; pos++) {
      const best = softmaxOf(logits)
      out.push({id: best[0][0], probability: best[0][1], others: best.slice(1, 4)})
      if (ends(best[0][0]) || out.length === most || pos === this.context) return out
      logits = this.forward([best[0][0]], bits, cache, pos)
    }
  }
  // Bytes, and bit-operations of a token, as search/costs.ipynb counts them; a float number counts as 16 bits.
  cost(bits) {
    const FLOAT = 16, total = {bytes: 0, bops: 0, floatBytes: 0, floatBops: 0}
    const inner = this.blocks.flatMap((b, i) => Object.keys(SITES).map(s => [b[s], bits[i][s]]))
    const packed = [[this.embedding, null], [this.head, null], ...inner], owners = new Set()
    for (const [l, given] of packed) {
      if (!(l instanceof Layer)) continue
      const b = given ? this.setting(given, l) : {w: l.fixed, a: null}, lora = l.adapters[b.key]
      const numbers = l.n * l.k, extra = lora ? lora.r * (l.n + l.k) : 0
      if (!owners.has(l.high)) total.bytes += (numbers * b.w + l.step.length * 32) / 8   // tied ends share their codes
      if (!owners.has(l.high)) total.floatBytes += numbers * FLOAT / 8
      owners.add(l.high)
      total.bytes += extra * FLOAT / 8
      if (l === this.embedding) continue   // a look-up multiplies nothing
      total.bops += numbers * b.w * (b.a ?? FLOAT) + extra * FLOAT * FLOAT
      total.floatBops += numbers * FLOAT * FLOAT
    }
    const names = new Set(this.d.layers.map(l => l.name))
    for (const [name, t] of Object.entries(this.tensors)) {
      const [layer, leaf] = [name.slice(0, name.lastIndexOf('.')), name.slice(name.lastIndexOf('.') + 1)]
      if (name === 'tokenizer' || name.includes('.adapters.') || names.has(layer) && leaf !== 'bias') continue
      total.bytes += t.length * FLOAT / 8; total.floatBytes += t.length * FLOAT / 8
    }
    return total
  }
}
function softmaxOf(logits) {   // [[id, probability], ...], the likeliest first
  const top = Math.max(...logits), e = Array.from(logits, x => Math.exp(x - top)), sum = e.reduce((a, b) => a + b, 0)
  return e.map((x, i) => [i, x / sum]).sort((a, b) => b[1] - a[1] || a[0] - b[0])
}
function promptOf(question, context) { return `question: ${question}\ncontext: ${context}\nanswer:` }
