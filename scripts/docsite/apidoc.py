"API documentation of the exported names, as Markdown: signature, docstring, and a table of parameters or fields."
import ast, importlib, inspect, io, re, textwrap, tokenize
from functools import cache

from fastcore.docments import docments
from nbdev.showdoc import BasicMarkdownRenderer
from project import CFG, ROOT

WIDTH = 96   # columns of a signature

@cache
def exported(module):
    "Exported names of a module, in the order of its source: `{name: object}`."
    mod = importlib.import_module(f"{CFG['lib_name']}.{module}")
    return {n: getattr(mod, n) for n in mod.__all__}

@cache
def owners():
    "Exported objects of the whole library by name and docstring: two modules may use a name."
    lib = ROOT/CFG['lib_path']
    modules = ('.'.join(p.relative_to(lib).with_suffix('').parts) for p in sorted(lib.rglob('[!_]*.py')))
    return {(n, inspect.getdoc(o)): o for m in modules for n,o in exported(m).items()}

def plain(text):
    "A comment whose signs are no Markdown outside of code: `2**bits` has two stars, and `~` is about."
    return ''.join(p if p[:1]=='`' else re.sub(r'([*~^$@<])', r'\\\1', p) for p in re.split('(`+[^`]+`+)', text))

# --- parts of an entry ----------------------------------------------------------------------------------------------

def short(x, width=40):
    "A default as it is written; a long one shortened."
    text = x.__name__ if inspect.isclass(x) or inspect.isroutine(x) else repr(x)
    return text if len(text)<=width else text[:width-1]+'…'

def type_name(annotation):
    "An annotation without the modules that its names come from."
    if annotation is inspect.Parameter.empty: return ''
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return re.sub(r'\b(?:[A-Za-z_]\w*\.)+(?=[A-Za-z_])', '', text)

def signature(name, f, end=''):
    "`name(a, b=1)`, over several lines where it is long; the types stand in the table. `end` is put behind."
    params = [p for p in inspect.signature(f).parameters.values() if p.name not in ('self','cls')]
    args,star = [],False
    for p in params:
        if p.kind is p.KEYWORD_ONLY and not star: args.append('*')
        star |= p.kind in (p.VAR_POSITIONAL, p.KEYWORD_ONLY)
        mark = {p.VAR_POSITIONAL:'*', p.VAR_KEYWORD:'**'}.get(p.kind, '')
        args.append(mark+p.name+('' if p.default is p.empty else f'={short(p.default)}'))
    line = f"{name}({', '.join(args)}){end}"
    if len(line)<=WIDTH: return line
    indent = dict(initial_indent='    ', subsequent_indent='    ')
    return f'{name}(\n' + textwrap.fill(', '.join(args), WIDTH, break_long_words=False, **indent) + f'\n){end}'

def fields(cls):
    "Fields written in a class's body: `(name, type, default, comment)`; a `description` of pydantic's is a comment too."
    source = textwrap.dedent(inspect.getsource(cls))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {t.start[0]: t.string.lstrip('# ').strip() for t in tokens if t.type==tokenize.COMMENT}
    for node in ast.parse(source).body[0].body:
        if not isinstance(node, ast.AnnAssign) or node.target.id.startswith('_'): continue
        kind,value = ast.unparse(node.annotation),ast.unparse(node.value) if node.value else ''
        said = [k.value.value for k in getattr(node.value, 'keywords', ()) if k.arg=='description']
        if 'ClassVar' not in kind: yield node.target.id, kind, value, comments.get(node.end_lineno) or ''.join(said)

def params(f):
    "Parameters of a function and what it returns: `(name, type, default, comment)`."
    f = inspect.unwrap(f)
    notes = docments(f, returns=True, args_kwargs=True)
    sig = inspect.signature(f)
    for p in sig.parameters.values():
        default = '' if p.default is p.empty else short(p.default)
        if p.name not in ('self','cls'): yield p.name, type_name(p.annotation), default, notes.get(p.name) or ''
    returned,note = type_name(sig.return_annotation),notes.get('return') or ''
    if note or returned not in ('', 'None'): yield '**Returns**', returned, '', note

def table(rows):
    "A Markdown table of parameters or fields, without columns that are empty."
    code = lambda s: f'`{s}`' if s and not s.startswith('**') else s
    rows = [(code(n), code(t), code(d), plain(c).replace('|', '\\|') if '`' not in c else plain(c)) for n,t,d,c in rows]
    columns = [i for i in range(4) if i==0 or any(r[i] for r in rows)]
    widths = [':'+'-'*n for n in (15, 20, 15, 50)]   # relative, for Pandoc
    lines = [['', 'Type', 'Default', 'Meaning'], widths, *rows]
    written = '\n'.join('| '+' | '.join(r[i] for i in columns)+' |' for r in lines)
    return f'::: {{.params}}\n\n{written}\n\n:::' if rows else ''

def methods(cls):
    "Public methods and properties written in a class, if they have a docstring."
    for name,f in list(vars(cls).items()):   # pydantic adds some when they are asked for
        f = getattr(f, '__func__', getattr(f, 'fget', None) or f)
        if not inspect.isfunction(f) or name.startswith('_') or not f.__doc__: continue
        yield name,f,isinstance(vars(cls)[name], property)

def source_link(module, line):
    "A link to a line of a module, where the project says in settings.ini where it lives."
    if not CFG['git_url']: return ''
    path = f"{CFG['lib_path']}/{module.replace('.', '/')}.py"
    return f"[source]({CFG['git_url']}/blob/{CFG['branch']}/{path}#L{line}){{.source-link}}"

def rows_of(o):
    "Rows of the table of a function or class: fields if it has any, else what it is called with."
    if not inspect.isclass(o): return list(params(o))
    if rows := list(fields(o)): return rows
    if not inspect.isfunction(vars(o).get('__init__')): return []
    return [r for r in params(o.__init__) if not r[0].startswith('**')]

def documented(o):
    "Names that the table of an object has to hold; other values have no table."
    if not inspect.isclass(o) and not inspect.isroutine(inspect.unwrap(o)): return []
    return [n for n,*_ in rows_of(o) if not n.startswith('**')]

# --- an entry -------------------------------------------------------------------------------------------------------

def entry(name, o, prop=False):
    "Signature, docstring and table of a function, a method, a property or a class."
    rows,end = rows_of(o),''
    if [(n, note) for n,_,_,note in rows]==[('**Returns**', '')]: end,rows = f' -> {rows[0][1]}',[]   # no table for a type alone
    try: sig = name+end if prop else signature(name, o, end)
    except ValueError: sig = name   # a class whose arguments nobody can list
    first,*more = (inspect.getdoc(o) or '').split('\n', 1)
    doc = '\n'.join([f'*{plain(first)}*' if first else '', *more])
    return '\n\n'.join(filter(None, [f'```python\n{sig}\n```', doc, table(rows)]))

@cache
def document(name, o, level=3):
    "The whole entry of an exported name: heading, link to the source, and its public methods below it."
    f = inspect.unwrap(o)
    link = source_link(o.__module__.removeprefix(CFG['lib_name']+'.'), inspect.getsourcelines(f)[1])
    parts = ['\n\n'.join(filter(None, [f"{'#'*level} {name} {{.api}}", link, entry(name, o)]))]
    for m,f,prop in methods(o) if inspect.isclass(o) else ():
        parts.append(f"{'#'*(level+1)} {name}.{m} {{.api}}\n\n{entry(f'{name}.{m}', f, prop)}")
    return '\n\n'.join(parts)+'\n'

class ApiDoc(BasicMarkdownRenderer):
    "What `show_doc` puts on a page. It documents the module's object, whose source has the comments of fields too."
    def _repr_markdown_(self):
        return document(self.nm, owners().get((self.nm, inspect.getdoc(self.sym)), self.sym), self.title_level)

# --- constants ------------------------------------------------------------------------------------------------------

def assignments(module):
    "Exported names that are assigned, not defined: `{name: (first line, source)}`."
    path = ROOT/CFG['lib_path']/f"{module.replace('.', '/')}.py"
    text = path.read_text(encoding='utf-8')
    lines,names = text.splitlines(),set(exported(module))
    found = {}
    for node in ast.parse(text).body:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        for t in targets:
            for n in (x.id for x in ast.walk(t) if isinstance(x, ast.Name) and x.id in names):
                found[n] = node.lineno, '\n'.join(lines[node.lineno-1:node.end_lineno])
    return found

def constants(module, limit=16):
    "Markdown of the values that a module exports: each with its source, a long one cut."
    found = assignments(module)
    if not found: return ''
    parts = ['## Constants\n\nValues that this chapter exports besides its functions and classes.']
    for name,(line,source) in found.items():
        rows = [textwrap.shorten(r, 200, placeholder=' …') if len(r)>200 else r for r in source.splitlines()]
        if len(rows)>limit: rows = rows[:limit-1]+['…']
        source = '```python\n'+'\n'.join(rows)+'\n```'
        parts.append('\n\n'.join(filter(None, [f'### {name} {{.api}}', source_link(module, line), source])))
    return '\n\n'.join(parts)+'\n'
