"""Use a server hard for minutes, and check every answer against the one that its text has alone.

    python scripts/soak.py my-model.safetensors --minutes 10 --clients 8
    python scripts/soak.py --minutes 2                     packs the embedded model

Clients ask at every profile, draw, stream, hang up, send nonsense and fill the queue. At the end a short report: the exit status is 1
if an answer was wrong, a request was stuck or answered with another status than it should, or memory grew."""
import argparse, json, os, random, re, signal, subprocess, sys, tempfile, threading, time
from collections import Counter, deque
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
import requests, torch
import switchable_llm as sl
from switchable_llm.core.profiles import Profile, as_profile
from switchable_llm.core.switching import use_profile
from switchable_llm.serving.lean import LiveStep, lean_tokens
from switchable_llm.serving.packed import load_packed, load_packed_tokenizer
from switchable_llm.server.words import Words, ends_of

SECONDS = 60   # the server's limit for a request
GROWTH = 20    # MB an hour that count as flat, beside what the fit cannot tell from nothing
OWN = [dict(name='first', default='w8a8', rules=[dict(bits='w4a8', layers='0-1')]), dict(name='last', default='w6a8'), 'w6a8', 'w8a8k8v4']
WORDS = 'question: When was the home of Bemola founded? context: Kafi was born in 1834. answer: Tara Pumu Deko Ridi'.split()
BAD = (b'{', b'[1]', b'\0', b'{"model":3}', b'{"prompt":"a"}',
       b'\xff{}', b'['*5000, b'{"model":"%s","prompt":"a","n":99}', b'{"model":"%s","prompt":""}')

def packed_tiny(folder):
    "The embedded model at three profiles, in one file."
    model,tokenizer = sl.load('tiny')
    torch.manual_seed(0)
    sl.make_switchable(model, ['bw8','bw6','w4a8'])
    sl.freeze(model, Path(folder)/'tiny.safetensors', tokenizer=tokenizer)
    return Path(folder)/'tiny.safetensors'

@contextmanager
def serving(file, *options):
    "`switchable-llm serve` in a process of its own: its address and the process."
    command = [sys.executable, '-c', 'import sys; from switchable_llm.apps.cli import main; sys.exit(main(sys.argv[1:]))']
    env = os.environ | dict(OMP_NUM_THREADS='1', SWITCHABLE_LLM_API_KEY='soak')
    p = subprocess.Popen([*command, 'serve', str(file), '--port', '0', '--seconds', str(SECONDS), *options],
                         env=env, stderr=subprocess.PIPE, text=True)
    for line in p.stderr:
        if found := re.search(r'listening at (\S+)/v1', line): break
    else: raise SystemExit('the server did not start')
    p.faults = []   # lines of the log that tell of one
    def read():
        for line in p.stderr:
            if 'Traceback' in line or 'Error' in line: p.faults.append(line.strip())
    threading.Thread(target=read, daemon=True).start()
    try: yield found[1], p
    finally:
        p.send_signal(signal.SIGTERM)
        p.wait(90)

class Offline:
    "The same file without a server."
    def __init__(self, file):
        self.model,self.tokenizer = load_packed(file),load_packed_tokenizer(file)
        self.words = Words(self.tokenizer, ends_of(self.model))

    def cut(self, prompt, n):
        "As much of a prompt as leaves room for `n` tokens."
        while len(self.words.of_text(prompt))+n>self.model.config.max_position_embeddings: prompt = prompt[:-20]
        return prompt

    @lru_cache(4096)
    def whole(self, prompt, profile, n, temperature, seed):
        chance,p = torch.Generator().manual_seed(seed),json.loads(profile)
        if isinstance(p, dict): p = Profile.from_dict(p)
        elif p not in self.model.switch.profiles: p = as_profile(p)
        with torch.no_grad(), use_profile(self.model, p):
            ids = list(lean_tokens(LiveStep(self.model), self.words.of_text(prompt), n, self.words.ends, temperature, generator=chance))
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def right(self, asked, i, profile):
        "What text `i` of a request should be."
        t = self.whole(asked['prompt'], json.dumps(profile), asked['max_tokens'], asked['temperature'], asked.get('seed', 0)+i)
        cut = min((t.index(s) for s in asked.get('stop') or () if s in t), default=None)
        return t if cut is None else t[:cut]

    def wrong(self, asked, spoke, texts):
        "Texts that are none of what the profiles that spoke say alone."
        profiles = [asked['profile']] if 'profile' in asked else spoke.split('+')   # `auto` may change between two texts of a request
        return [(i, t) for i,t in enumerate(texts) if t not in [self.right(asked, i, p) for p in profiles]]

class Client(threading.Thread):
    "Asks until it is told to stop."
    def __init__(self, n, at, models, offline, found, over):
        super().__init__(daemon=True)
        self.rng,self.at,self.models,self.offline,self.found,self.over = random.Random(n),at,models,offline,found,over
        self.http,self.began = requests.Session(),None
        self.http.headers['Authorization'] = 'Bearer soak'

    def run(self):
        kinds = dict(whole=10, stream=10, hang_up=3, time_out=2, malformed=3, burst=.3)
        while not self.over.is_set():
            kind, = self.rng.choices([*kinds], [*kinds.values()])
            self.began = time.monotonic()
            try: getattr(self, kind)()
            except requests.RequestException as e: self.wrong(kind, f'{type(e).__name__}: {e}')
            self.found.longest = max(self.found.longest, time.monotonic()-self.began)
            self.began = None

    def wrong(self, kind, what): self.found.odd.append(f'{kind}: {what}'[:300])

    def asked(self, n=None):
        r = self.rng
        words,begun = r.choices(WORDS, k=r.choice((2, 8, 20, 60))),' '.join(WORDS*8)[:r.choice((0, 0, 300))]   # as others begin too
        a = dict(model=r.choice(self.models), prompt=f"{begun}{' '.join(words)}", max_tokens=n or r.choice((1, 5, 20, 60)),
                 temperature=0, n=1)
        a['prompt'] = self.offline.cut(a['prompt'], a['max_tokens'])
        if r.random()<.4: a.update(temperature=r.choice((.5, 1., 2.)), seed=r.randrange(8), n=r.choice((1, 1, 3)))
        if r.random()<.3: a['stop'] = r.sample([' in ', 'born', '?', '\n', 'ed ', 'zzz'], 2)
        if r.random()<.2: a.update(model=self.models[0], profile=r.choice(OWN))
        return a

    def post(self, a, kind, path='completions', **kw):
        kw = dict(data=a) if isinstance(a, bytes) else dict(json=a) | kw
        answer = self.http.post(f'{self.at}/v1/{path}', headers={'Content-Type':'application/json'}, **dict(timeout=SECONDS+15)|kw)
        self.found.statuses[kind, answer.status_code] += 1
        return answer

    def check(self, kind, a, spoke, texts):
        self.found.done.append((kind, a, spoke.partition(':')[2], texts))

    def whole(self):
        a = self.asked()
        if (r := self.post(a, 'whole')).status_code==200:
            d = r.json()
            self.check('whole', a, d['model'], [c['text'] for c in d['choices']])
        elif r.status_code!=429: self.wrong('whole', r.text)

    def pieces(self, a, kind):
        with self.post(a | dict(stream=True), kind, stream=True) as r:
            if r.status_code not in (200, 429): self.wrong(kind, r.text)
            if r.status_code==200: yield from (l[6:] for l in r.iter_lines() if l.startswith(b'data: '))

    def stream(self):
        a = self.asked()
        texts,spoke,end = ['']*a['n'],None,None
        for piece in self.pieces(a, 'stream'):
            end = piece
            if piece==b'[DONE]': continue
            d = json.loads(piece)
            if 'error' in d: return self.wrong('stream', piece)
            spoke = d['model']
            for c in d['choices']: texts[c['index']] += c['text']
        if end==b'[DONE]': self.check('stream', a, spoke, texts)
        elif end: self.wrong('stream', 'no end')

    def hang_up(self):
        for i,_ in enumerate(self.pieces(self.asked(100) | dict(stop=None), 'hang up')):
            if i>=self.rng.choice((0, 1, 5)): break

    def time_out(self):
        try: self.post(self.asked(100), 'time out', timeout=self.rng.choice((.01, .05, .2)))
        except requests.Timeout: self.found.statuses['time out', 'left'] += 1

    def malformed(self):
        bad = self.rng.choice(BAD).replace(b'%s', self.models[0].encode())
        r = self.post(bad, 'malformed', self.rng.choice(('completions','chat/completions')))
        if r.status_code!=400 or 'error' not in r.json(): self.wrong('malformed', f'{bad[:60]}: {r.status_code} {r.text}')

    def burst(self):
        a = self.asked(20) | dict(n=16, temperature=1., seed=self.rng.randrange(8))
        answers = [threading.Thread(target=self.one_of_burst, args=(a,)) for _ in range(4)]
        for t in answers: t.start()
        for t in answers: t.join()

    def one_of_burst(self, a):
        try: r = self.post(a, 'burst')
        except requests.RequestException as e: return self.wrong('burst', f'{type(e).__name__}: {e}')
        if r.status_code==200: self.check('burst', a, r.json()['model'], [c['text'] for c in r.json()['choices']])
        elif r.status_code!=429: self.wrong('burst', r.text)

class Found:
    "What happened."
    def __init__(self):
        self.statuses,self.done,self.odd,self.longest = Counter(),deque(),[],0.
        self.checked,self.wrong,self.memory,self.stuck = 0,[],[],0

def metrics(at):
    "Numbers of the server by name."
    lines = requests.get(f'{at}/metrics', headers={'Authorization':'Bearer soak'}, timeout=10).text.splitlines()
    return {k:float(v) for k,v in (l.rsplit(' ', 1) for l in lines if not l.startswith('#'))}

def quiet(at, seconds):
    "The numbers once nobody is written for, or what they are after so long."
    for _ in range(int(seconds*2)):
        m = metrics(at)
        if not m['switchable_llm_waiting']+m['switchable_llm_running']: break
        time.sleep(.5)
    return m

def growth(memory):
    "MB an hour over the second half of samples (seconds, bytes): slope of a straight line, and twice its standard error."
    at = torch.tensor(memory[len(memory)//2:], dtype=torch.float64)
    x,y = at[:, 0]-at[:, 0].mean(),at[:, 1]-at[:, 1].mean()
    slope = (x@y)/(x@x)
    error = ((y-slope*x).square().sum()/max(1, len(x)-2)/(x@x)).sqrt()
    return [float(v)*3600/1e6 for v in (slope, 2*error)]

def soak(at, p, offline, models, minutes, clients):
    "Let them ask, sample memory and check answers meanwhile."
    found,over,start = Found(),threading.Event(),time.monotonic()
    asking = [Client(i, at, models, offline, found, over) for i in range(clients)]
    for c in asking: c.start()
    sampled = 0
    while any(c.is_alive() for c in asking) or found.done:
        now = time.monotonic()-start
        if now>60*minutes: over.set()
        if now>60*minutes+2*SECONDS and not found.done: break   # who still asks is stuck
        if now-sampled>2 and p.poll() is None and not over.is_set():
            sampled = now
            found.memory.append((now, int(open(f'/proc/{p.pid}/statm').read().split()[1])*os.sysconf('SC_PAGE_SIZE')))
        if not found.done: time.sleep(.05); continue
        kind,asked,spoke,texts = found.done.popleft()
        found.checked += len(texts)
        found.wrong += [(kind, asked, spoke, *w) for w in offline.wrong(asked, spoke, texts)]
    found.stuck = sum(c.is_alive() for c in asking)+(found.longest>SECONDS+10)
    return found

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('file', nargs='?', help='a file that `freeze` wrote (default: the embedded model)')
    parser.add_argument('--minutes', type=float, default=10)
    parser.add_argument('--clients', type=int, default=8)
    parser.add_argument('--out', help='a JSON file for the numbers')
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        file = args.file or packed_tiny(folder)
        offline = Offline(file)
        with serving(file, '--waiting', '24', '--texts', '24') as (at, p):
            models = requests.get(f'{at}/v1/models', headers={'Authorization':'Bearer soak'}, timeout=10).json()['data']
            found = soak(at, p, offline, [m['id'] for m in models], args.minutes, args.clients)
            end = {k.removeprefix('switchable_llm_'):v for k,v in quiet(at, 30).items()} if p.poll() is None else {}
    return report(args, found, end, p)

def report(args, found, end, p):
    "Say what was found; 1 if anything is wrong."
    slope,error = growth(found.memory) if len(found.memory)>8 else (0., 0.)
    left = end.get('memory', -1)-end.get('memory_prefixes', 0)
    faults = dict(wrong_answers=len(found.wrong), stuck=found.stuck, unexpected=len(found.odd), grows=slope-error>GROWTH,
                  pages_left=left!=0, still_at_work=end.get('waiting', 1)+end.get('running', 1)>0, exit_status=p.returncode,
                  log=len(p.faults))
    by = {f'{kind} {status}':n for (kind,status),n in sorted(found.statuses.items(), key=str)}
    mb = [b/1e6 for _,b in found.memory] or [0.]
    print(f"{args.minutes:g} minutes, {args.clients} clients: {sum(found.statuses.values())} requests, {found.checked} texts checked, "
          f"{len(found.wrong)} wrong, {found.stuck} stuck, {len(found.odd)} answered otherwise than they should")
    print('by kind and status: ' + ', '.join(f'{k}: {n}' for k,n in by.items()))
    print(f"longest request {found.longest:.1f} s; longest step {1000*end.get('longest_step', 0):.0f} ms; "
          f"{end.get('switches', 0):.0f} changes of profile")
    print(f"memory {mb[0]:.0f} MB at first, {mb[len(mb)//2]:.0f} half way, {mb[-1]:.0f} at the end; second half: {slope:+.1f} MB an hour "
          f"(± {error:.1f}): {'grows' if faults['grows'] else 'flat'}")
    print(f"pages after the end: {end.get('memory', -1)/1e6:.2f} MB, "
          f"of {end.get('prefixes', 0):.0f} beginnings {end.get('memory_prefixes', 0)/1e6:.2f} MB")
    for what in (*found.wrong[:5], *found.odd[:10], *p.faults[:5]): print('  ', str(what)[:300])
    print('all well' if not any(faults.values()) else 'NOT WELL: '+', '.join(k for k,v in faults.items() if v))
    if args.out:
        record = dict(minutes=args.minutes, clients=args.clients, faults=faults, statuses=by, checked=found.checked,
                      longest=found.longest, memory=found.memory, growth=[slope, error], end=end)
        Path(args.out).write_text(json.dumps(record, indent=1))
    return int(any(faults.values()))

if __name__=='__main__': sys.exit(main())
