"""The book has every notebook, no dead link, and opens from the disk without network."""
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cmim_repro.report import book
from cmim_repro.report.book import contents, main, parts, without_dead_links, without_directives, write_sources

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = {path.relative_to(ROOT/'nbs').as_posix() for path in (ROOT/'nbs').rglob('*.ipynb')
             if '.ipynb_checkpoints' not in path.parts} - {'index.ipynb'}


@pytest.fixture(scope='module')
def sources(tmp_path_factory):
    "What Sphinx reads, with a reference of two modules: all of them take half a minute."
    folder, everything = tmp_path_factory.mktemp('sources'), book.reference_page
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(book, 'reference_page', lambda name: everything(name) if '.theory.cmi' in name else '')
        write_sources(folder)
    return folder


def test_each_notebook_is_in_one_part_and_in_the_list():
    found = [path.relative_to(ROOT/'nbs').as_posix() for paths in parts(ROOT/'nbs').values() for path in paths]
    assert sorted(found) == sorted(NOTEBOOKS)
    assert all(f']({name})' in contents() for name in NOTEBOOKS)


def test_a_folder_of_its_own_comes_last(tmp_path):
    first = json.dumps({'cells': [{'cell_type': 'markdown', 'source': ['# A title\n', '\n', '> What for.']}]})
    for name in ('zoo/01_a.ipynb', 'theory/01_b.ipynb', 'run_table10.ipynb', 'run_table2.ipynb', 'run_figure1.ipynb',
                 '.hidden/x.ipynb', '_proc/y.ipynb', 'index.ipynb'):
        (tmp_path/name).parent.mkdir(exist_ok=True)
        (tmp_path/name).write_text(first)
    names = {part: [path.name for path in paths] for part, paths in parts(tmp_path).items()}
    assert list(names.items()) == [('theory', ['01_b.ipynb']),
                                   ('run', ['run_table2.ipynb', 'run_table10.ipynb', 'run_figure1.ipynb']),
                                   ('zoo', ['01_a.ipynb'])]
    assert '- [A title](zoo/01_a.ipynb). What for.' in contents(tmp_path)


def test_sources_have_every_notebook_with_its_outputs(sources):
    for name in NOTEBOOKS:
        mine, theirs = (json.loads((folder/'nbs'/name).read_text(encoding='utf-8')) for folder in (ROOT, sources))
        def pictures(notebook):
            return [o for cell in notebook['cells'] for o in cell.get('outputs', ()) if 'image/png' in o.get('data', {})]
        assert pictures(theirs) == pictures(mine), name
        assert not any(re.search(r'^#\|', ''.join(cell['source']), re.M) for cell in theirs['cells']
                       if cell['cell_type'] == 'code'), name


def test_the_sidebar_lists_everything(sources):
    text = (sources/'nbs'/'index.ipynb').read_text(encoding='utf-8')
    cells = [''.join(cell['source']) for cell in json.loads(text)['cells']]
    listed = {line for cell in cells if cell.startswith('```{toctree}') for line in cell.splitlines()}
    assert {name.removesuffix('.ipynb') for name in NOTEBOOKS} <= listed
    assert {'../README', '../data/results/REPORT', '../gallery', '../api/theory.cmi'} <= listed


def test_no_link_of_the_texts_is_dead(sources):
    for path in sources.rglob('*.md'):
        for target in re.findall(r'(?<!!)\[[^\]\n]+\]\((?!\w+:|#)([^)\s]+)\)', path.read_text(encoding='utf-8')):
            assert (path.parent/target.partition('#')[0]).is_file(), f'{path.name}: {target}'


def test_the_reference_shows_shapes(sources):
    text = (sources/'api'/'theory.cmi.md').read_text(encoding='utf-8')
    assert text.startswith('# theory.cmi\n') and '# Log-probabilities, (B, C)' in text and 'nats' in text
    assert '[source]' not in text and 'CMIAccumulator.' in text


def test_links_and_directives(tmp_path):
    (tmp_path/'there.md').write_text('')
    assert without_dead_links('[a](there.md) [b](gone.md) [c](there.md#x) [d](#y)', tmp_path) == \
        '[a](there.md) b [c](there.md#x) [d](#y)'
    cells = [{'cell_type': 'code', 'source': ['#| hide\n', 'assert True']},
             {'cell_type': 'code', 'source': ['#| exporti\n', 'x = 1 #| not a directive']},
             {'cell_type': 'markdown', 'source': ['#| a heading of a strange kind']}]
    kept = without_directives({'cells': cells, 'nbformat': 4})
    assert [cell['source'] for cell in kept['cells']] == ['x = 1 #| not a directive', '#| a heading of a strange kind']


def test_a_folder_with_something_else_is_left_alone(tmp_path, capsys):
    pytest.importorskip('sphinx', reason="Sphinx is not installed; pip install '.[book]'")
    (tmp_path/'thesis.tex').write_text('years of work')
    assert main(['--out', str(tmp_path)]) == 2
    assert 'is no book' in capsys.readouterr().err and (tmp_path/'thesis.tex').read_text() == 'years of work'


def test_without_sphinx_it_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'sphinx.application', None)
    assert main(['--out', str(tmp_path/'book')]) == 2
    assert capsys.readouterr().err == "error: The book needs Sphinx and its parts: pip install -e '.[book]'.\n"


def test_the_book_is_built_and_opens_from_the_disk(tmp_path):
    "All of it, from the command, without a warning; and again over itself."
    pytest.importorskip('sphinx', reason="Sphinx is not installed; pip install '.[book]'")
    command = [sys.executable, '-m', 'cmim_repro.report.book', '--out', str(tmp_path/'book')]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, 'http_proxy': 'none'})
    assert (done.returncode, done.stderr) == (0, ''), done.stderr
    assert {path.relative_to(tmp_path/'book'/'nbs').with_suffix('.ipynb').as_posix()
            for path in (tmp_path/'book'/'nbs').rglob('*.html')} - {'index.ipynb'} == NOTEBOOKS
    chromium = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
    api = pytest.importorskip('playwright.sync_api')
    if not chromium: pytest.skip('there is no Chromium on PATH')
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, chromium_sandbox=False, args=['--disable-gpu'])
        for name in ('index.html', 'nbs/theory/06_bounds.html', 'nbs/run_table1.html', 'api/theory.cmi.html',
                     'gallery/index.html', 'search.html?q=centroid'):
            page, said = browser.new_page(viewport={'width': 390, 'height': 800}), []
            page.on('console', lambda message, said=said: said.append(message.text))
            page.on('request', lambda request, said=said: None if request.url.startswith(('file:', 'data:', 'blob:'))
                    else said.append(request.url))
            page.goto(f'file://{tmp_path}/book/{name}')
            page.wait_for_timeout(1500)
            wide = page.evaluate('document.documentElement.scrollWidth - document.documentElement.clientWidth')
            assert (said, wide) == ([], 0), name
            if 'bounds' in name: assert page.locator('mjx-container').count() > 100
            if 'search' in name: assert page.locator('#search-results li').count() > 10
        browser.close()
