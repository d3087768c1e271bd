"""The book as a whole: width, size and shape of cells, what is shown, and that imports point one way."""
import ast
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
WIDTH, LINES, CELLS, KILOBYTES = 120, 40, 60, 200
NOTEBOOKS = sorted(p for p in (ROOT/'nbs').rglob('*.ipynb') if not any(part.startswith(('.', '_')) for part in p.relative_to(ROOT).parts)
                   and 'papermill' not in json.loads(p.read_text(encoding='utf-8'))['metadata']) # copies that were executed beside them
RUNS = [p for p in NOTEBOOKS if p.name.startswith('run_')]
PAPER = [p for p in RUNS if re.fullmatch(r'run_(table|figure)\d+', p.stem)]
PARTS = ('core', 'theory', 'lab', 'defenses', 'attacks', 'experiments', 'report', 'audits', 'exhibits') # each may import those before it
BESIDE = {'defenses', 'attacks'} # neither knows the other


def name_of(path): return path.relative_to(ROOT/'nbs').as_posix()


def cells(path, kind): return [cell for cell in json.loads(path.read_text(encoding='utf-8'))['cells'] if cell['cell_type'] == kind]
def source(cell): return ''.join(cell['source'])
def exported(cell): return re.search(r'^#\|\s*exporti?\b', source(cell), re.M) is not None


every_notebook = pytest.mark.parametrize('path', NOTEBOOKS, ids=name_of)


@every_notebook
def test_prose_is_at_most_120_wide(path):
    "Formulas on lines of their own, tables and links may be wider."
    for cell in cells(path, 'markdown'):
        text = re.sub(r'\$\$.*?\$\$', '', source(cell), flags=re.S)
        for line in text.splitlines():
            if line.startswith('|') or re.search(r'\]\(|https?://', line): continue
            assert len(line) <= WIDTH, line


@every_notebook
def test_no_sentence_of_a_cell_is_there_twice(path):
    for cell in cells(path, 'markdown'):
        lines = Counter(line for line in source(cell).splitlines() if len(line) > 20 and not line.startswith('|'))
        assert not [line for line, times in lines.items() if times > 1]


@every_notebook
def test_a_cell_fits_on_a_screen(path):
    for cell in cells(path, 'code'): assert len(source(cell).splitlines()) <= LINES, source(cell)[:300]


@every_notebook
def test_a_notebook_names_its_kernel(path):
    "JupyterLab asks for one otherwise, and changes the file."
    assert json.loads(path.read_text(encoding='utf-8'))['metadata']['kernelspec']['name'] == 'python3'


@every_notebook
def test_a_notebook_is_small(path):
    assert path.stat().st_size <= 1000*KILOBYTES and len(cells(path, 'code')) <= CELLS


@every_notebook
def test_no_comprehension_stands_inside_another(path):
    kinds = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
    for cell in filter(exported, cells(path, 'code')):
        for outer in ast.walk(ast.parse(source(cell))):
            if not isinstance(outer, kinds): continue
            inner = [node for node in ast.walk(outer) if isinstance(node, kinds) and node is not outer]
            assert not inner, ast.unparse(outer)


def test_no_cell_is_written_again_and_again():
    found = Counter()
    for path in NOTEBOOKS: found.update({source(cell).strip() for cell in cells(path, 'code')} - {''})
    assert [text for text, count in found.items() if count > 3] == []


def test_what_the_run_notebooks_do_not_export_is_little():
    lines = {path.name: sum(len(source(cell).splitlines()) for cell in cells(path, 'code') if not exported(cell)) for path in PAPER}
    assert len(PAPER) == 15 and sum(lines.values()) <= 31*len(PAPER), lines


@pytest.mark.parametrize('part', ['experiments', 'report', 'run'])
def test_a_third_of_the_code_cells_show_something(part):
    chosen = RUNS if part == 'run' else [p for p in NOTEBOOKS if p.parent.name == part]
    code = [cell for path in chosen for cell in cells(path, 'code')]
    assert sum(bool(cell['outputs']) for cell in code) >= len(code)/3


def test_no_output_is_older_than_its_code():
    found = subprocess.run([sys.executable, str(ROOT/'.ci'/'outputs.py'), 'stale'], capture_output=True, text=True, cwd=ROOT)
    assert found.returncode == 0, found.stderr


def test_outputs_show_no_warnings_and_no_places_of_a_machine():
    for path in NOTEBOOKS:
        for cell in cells(path, 'code'):
            for output in cell['outputs']:
                assert output['output_type'] != 'error' and output.get('name') != 'stderr', f'{name_of(path)}: {source(cell)}'
                text = json.dumps({k: v for k, v in output.get('data', output).items() if not k.startswith('image/')})
                assert not re.search(r'/home/|/root/|/tmp/|/work/| at 0x[0-9a-f]{6}', text), f'{name_of(path)}: {text[:300]}'


def modules(): return [p for p in (ROOT/'cmim_repro').rglob('*.py') if p.name not in ('_modidx.py', '__init__.py')]


def part_of(dotted): return dotted.split('.')[1] if dotted.count('.') else ''


def imports(path):
    "Modules of the package that a module imports, dotted, wherever in it."
    package = ['cmim_repro', *path.relative_to(ROOT/'cmim_repro').parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.ImportFrom):
            base = '.'.join(package[:len(package) - node.level + 1]) if node.level else ''
            yield '.'.join(filter(None, [base, node.module]))
        elif isinstance(node, ast.Import): yield from (alias.name for alias in node.names)


@pytest.mark.parametrize('path', modules(), ids=lambda path: path.relative_to(ROOT/'cmim_repro').as_posix())
def test_imports_point_one_way(path):
    own = path.relative_to(ROOT/'cmim_repro').with_suffix('').parts[0]
    if own not in PARTS: return # a door for readers, which may use everything
    for name in imports(path):
        if own == 'theory': assert not name.startswith('torch.distributed') and name != 'torch.distributed', name
        if not name.startswith('cmim_repro.'): continue
        other = part_of(name)
        assert PARTS.index(other) <= PARTS.index(own), f'{own} imports {name}'
        assert not (other in BESIDE and own in BESIDE and other != own), f'{own} imports {name}'


def test_no_module_imports_itself_in_a_circle():
    graph = {'.'.join(['cmim_repro', *p.relative_to(ROOT/'cmim_repro').with_suffix('').parts]): p for p in modules()}
    seen, path = set(), []

    def visit(name):
        assert name not in path, ' -> '.join([*path, name])
        if name in seen or name not in graph: return
        path.append(name)
        for other in imports(graph[name]): visit(other)
        seen.add(path.pop())

    for name in graph: visit(name)


def test_the_index_shows_every_notebook():
    "Its list is made when it is executed, so a new notebook needs `make outputs NOTEBOOKS=nbs/index.ipynb` too."
    shown = json.dumps([cell['outputs'] for cell in cells(ROOT/'nbs'/'index.ipynb', 'code')])
    assert [name for path in NOTEBOOKS if (name := name_of(path)) not in shown and name != 'index.ipynb'] == []
