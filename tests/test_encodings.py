"""Every text file is read and written as UTF-8, whatever the locale: Windows' is CP1252, many a cluster's is ASCII."""
import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ASCII = {"open('/proc/meminfo')", "open(self.folder / 'metrics.jsonl', 'a')"} # hold nothing else; the second JSON with escapes
METHODS, TEXT = ('read_text', 'write_text'), ('text', 'universal_newlines')


def names_mode(call):
    "Is a binary mode asked for?"
    words = [word for word in [*call.args, *(k.value for k in call.keywords if k.arg == 'mode')] if isinstance(word, ast.Constant)]
    return any(isinstance(word.value, str) and 'b' in word.value and set(word.value) <= set('rwxab+') for word in words)


def opens_text(call):
    "Does a call read or write text in the encoding of the locale?"
    function, keywords = call.func, {k.arg for k in call.keywords}
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, 'id', '')
    owner = ast.unparse(function.value) if isinstance(function, ast.Attribute) else ''
    if 'encoding' in keywords or None in keywords or ast.unparse(call) in ASCII: return False
    if name in METHODS: return True
    if name in ('TemporaryFile', 'NamedTemporaryFile'): return bool(call.args or 'mode' in keywords) and not names_mode(call)
    if owner == 'subprocess': return bool(keywords & {*TEXT})
    return name == 'open' and owner not in ('Image', 'tarfile', 'os', 'webbrowser') and not names_mode(call)


def lacking(text): return [ast.unparse(node) for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call) and opens_text(node)]


def sources():
    for path in [*(ROOT/'cmim_repro').rglob('*.py'), *(ROOT/'.ci').rglob('*.py')]: yield path, path.read_text(encoding='utf-8')
    for path in (ROOT/'nbs').rglob('*.ipynb'):
        cells = json.loads(path.read_text(encoding='utf-8'))['cells']
        texts = [''.join(cell['source']) for cell in cells if cell['cell_type'] == 'code']
        yield path, '\n'.join(line for text in texts for line in text.splitlines() if not line.lstrip().startswith(('%', '!')))


def test_every_text_file_names_its_encoding():
    found = {str(path.relative_to(ROOT)): calls for path, text in sources() if '.ipynb_checkpoints' not in path.parts and (calls := lacking(text))}
    assert not found, found


@pytest.mark.parametrize('text, count', [("open('a')", 1), ("open('a', 'w')", 1), ("open('a', 'rb')", 0), ("open('a', encoding='utf-8')", 0), ("p.read_text()", 1),
                                         ("p.open()", 1), ("p.open('wb')", 0), ("Image.open(p)", 0), ("subprocess.run(c, text=True)", 1), ("tempfile.TemporaryFile('w+')", 1)])
def test_what_is_found(text, count): assert len(lacking(text)) == count


def test_the_page_in_an_ascii_locale(tmp_path):
    code = 'from cmim_repro.report.page import write_page; import sys; write_page(sys.argv[1])'
    own = {**os.environ, 'LC_ALL': 'C', 'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0', 'PYTHONPATH': str(ROOT)}
    done = subprocess.run([sys.executable, '-c', code, str(tmp_path)], env=own, capture_output=True,
                          encoding='utf-8', errors='replace')
    assert done.returncode == 0, done.stderr
    assert 'α' in (tmp_path/'index.html').read_text(encoding='utf-8')
