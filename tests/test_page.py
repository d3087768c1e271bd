"""The page of results and Figure 2's page open without network; what fills them may be killed, stopped and repeated."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from urllib.parse import unquote

import nbformat
import numpy as np
import pandas as pd
import psutil
import pytest
import torch

from cmim_repro import audit
from cmim_repro.audits.report import write_report
from cmim_repro.report.exhibit import Exhibit
from cmim_repro.report.figures import Picture, cmi_curves, save_picture, simplex_figure, simplex_html, simplex_points
from cmim_repro.report.formats import Table, runs_cell, save_table
from cmim_repro.report.page import draw, exhibits, main, page_html, write_page

ROOT = Path(__file__).resolve().parents[1]
NAMES = list(exhibits(ROOT/'nbs'))
FIGURES = [name for name in NAMES if name.startswith('figure')]
TABLES = [name for name in NAMES if name not in FIGURES]
CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
FLAGS = ['--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking',
         '--disable-component-update', '--disable-sync']
ALPHAS = (.25, 1, 4)


@pytest.fixture(scope='module')
def browser():
    if not CHROMIUM: pytest.skip('there is no Chromium on PATH; apt-get install chromium, or .ci/run')
    api = pytest.importorskip('playwright.sync_api', reason="Playwright is not installed; pip install '.[dev]'")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, chromium_sandbox=False,
                                             args=FLAGS)
        yield browser
        browser.close()


class Visit:
    "A page opened from disk, with everything that went wrong on it; whatever is not a file is refused and noted."
    def __init__(self, browser, path, **options):
        self.errors, self.refused, self.page = [], [], browser.new_page(**options)
        self.page.route('**/*', self.answer)
        self.page.on('console', lambda message: self.errors.append(message.text) if message.type in ('error', 'warning')
                     else None)
        self.page.on('pageerror', lambda error: self.errors.append(str(error)))
        self.page.on('requestfailed', lambda request: self.errors.append(f'{request.url}: {request.failure}'))
        self.page.goto(Path(path).as_uri())

    def answer(self, route):
        if route.request.url.startswith(('file:', 'data:', 'blob:')): route.continue_()
        else: self.refused.append(route.request.url); route.abort()

    def close(self):
        self.page.close()
        assert (self.errors, self.refused) == ([], [])


def outputs(scale):
    labels, generator = torch.arange(90) % 3, torch.Generator().manual_seed(0)
    return (scale*torch.randn(90, 5, generator=generator) + 2*torch.eye(5)[labels]).log_softmax(-1), labels


@pytest.fixture(scope='module')
def figures(tmp_path_factory):
    "A folder as the notebooks leave it, with invented numbers, and its gallery; Table 3 is missing."
    folder, models = tmp_path_factory.mktemp('figures'), {'ce': outputs(2.), 'cmim': outputs(.5)}
    place, table = folder/'quick', Table('Accuracy', ('Model',), tuple('abcdefghij'),
                                         ((('CMIM',), (runs_cell([49., 50.], 51.2, ls_mean=52.),)*10),),
                                                                                          'Made by `a test`.')
    for name in TABLES:
        if name != 'table3': save_table(table, place/name)
    save_table(table, place/'models')
    for name in FIGURES:
        figure = simplex_figure(models, (0, 1, 2)) if name == 'figure2' else cmi_curves([0, 1, 2], {'ce': [0, 1, 2]})
        page = simplex_html(models, (0, 1, 2), ALPHAS) if name == 'figure2' else ''
        save_picture(Picture(figure, pd.DataFrame({'alpha': [1]}), page), 'Made by `a test`.', place/name)
    answer = {'verdict': 'undecided', 'because': 'Gains from -0.1 to 0.2 <points>.', 'command': 'papermill'}
    (place/'table5.answer.json').write_text(json.dumps(answer))
    assert main(['--figures', str(folder)]) == 0
    return folder


def test_the_gallery_opens_from_disk_without_network(browser, figures):
    visit = Visit(browser, figures/'index.html')
    page = visit.page
    page.evaluate("document.querySelectorAll('img').forEach(image => image.loading = 'eager')")
    page.wait_for_function("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    assert page.locator('img').count() >= len(FIGURES) and page.locator('#table5 [data-shelf=quick] table').count() == 1
    assert page.locator('[data-shelf=quick]').count() == len(TABLES) + len(FIGURES) - 1
    assert 'make tables PROFILE=quick' in page.locator('#table3 .missing').inner_text()
    assert page.locator('#table3 [data-shelf=quick]').count() == 0
    assert page.locator('#table5 .claim .answer').all_inner_texts() == ['Undecided (quick): Gains from -0.1 to 0.2 '
                                                                        '<points>.']
    assert page.locator('#table6 .claim .answer').count() == 0
    links = page.eval_on_selector_all('a', "all => all.map(a => a.getAttribute('href'))")
    assert len(links) > 60
    for link in links:
        assert page.locator(link).count() == 1 if link.startswith('#') else (figures/unquote(link)).exists(), link
    page.locator('#figure2 summary').click()
    inside = page.frame_locator('#figure2 iframe')
    inside.locator('.slider-rail-touch-rect').wait_for()
    assert inside.locator('.scatterlayer .point').count() == 2*90
    visit.close()


def test_the_gallery_shows_one_shelf_when_asked(browser, figures):
    visit = Visit(browser, figures/'index.html')
    shown = visit.page.locator('.shelf:visible')
    everything = shown.count()
    visit.page.get_by_label('short, committed').check(force=True)
    committed = {shown.nth(i).get_attribute('data-shelf') for i in range(shown.count())}
    assert 0 < shown.count() < everything and committed == {'short-committed'}
    assert visit.page.locator('#table5 .answer').is_hidden()
    visit.close()


def test_the_gallery_fits_a_telephone(browser, figures):
    visit = Visit(browser, figures/'index.html', viewport={'width': 380, 'height': 800})
    assert visit.page.evaluate('document.documentElement.scrollWidth') <= 380
    visit.close()


@pytest.mark.parametrize('width', [1400, 390])
def test_the_report_of_an_audit_needs_nothing_else_and_fits(width, browser, tmp_path):
    page, _ = write_report(audit(*outputs(1.), splits=['train', 'test', 'test']*30, draws=20), tmp_path)
    visit = Visit(browser, page, viewport={'width': width, 'height': 900})
    visit.page.frame_locator('iframe').locator('.slider-container').wait_for()
    assert visit.page.evaluate('document.documentElement.scrollWidth') <= width and visit.page.locator('table').count() == 3
    visit.close()


HIDDEN = "[...document.querySelectorAll('.scroll')].filter(x => x.scrollWidth > x.clientWidth).length"
TABLE1 = '[data-shelf=quick-committed] .scroll'


def test_the_committed_table_1_is_seen_whole_on_a_screen_and_on_paper(browser, figures):
    visit = Visit(browser, figures/'index.html', viewport={'width': 1400, 'height': 900})
    assert visit.page.evaluate(HIDDEN) == 0
    visit.page.emulate_media(media='print')
    visit.page.set_viewport_size({'width': 1030, 'height': 720}) # A4 across, without its margins
    edges = "[...document.querySelectorAll('table')].map(x => x.getBoundingClientRect().right)"
    assert max(visit.page.evaluate(edges)) <= 1030
    visit.close()


def test_the_first_column_stays_when_a_wide_table_is_scrolled(browser, figures):
    visit = Visit(browser, figures/'index.html', viewport={'width': 390, 'height': 800})
    table = visit.page.locator(TABLE1).first
    first = table.locator('tbody tr:not(.section) > :first-child').first
    before = first.bounding_box()['x']
    assert table.evaluate('x => { x.scrollLeft = 300; return x.scrollLeft }') == 300
    assert abs(first.bounding_box()['x'] - before) < 1
    kept = "[...document.querySelectorAll('.scroll tr:not(.section) > :first-child')].map(x => x.getBoundingClientRect().width)"
    assert max(visit.page.evaluate(kept)) < 200 # it leaves room for the others
    visit.close()


def eventually(state, wanted, what, seconds=60.):
    "Wait until `wanted(state())` holds, and say what was seen last when it does not."
    end = time.monotonic() + seconds
    while not wanted(found := state()):
        assert time.monotonic() < end, f'{what}: after {seconds:g} s there is {found!r:.500}'
        time.sleep(.05)
    return found


def test_the_slider_of_figure_2_moves_the_points(browser, figures):
    visit = Visit(browser, figures/'quick'/'figure2.html')
    def drawn():
        "The points of each trace that are on the screen, in the units of the axes."
        found = visit.page.evaluate("""() => [...document.querySelectorAll('.scatterlayer .trace')].map(trace =>
            [...trace.querySelectorAll('.point')].map(point => point.getAttribute('transform')))""")
        places = [[tuple(map(float, re.findall(r'-?[\d.]+', point)[:2])) for point in trace] for trace in found]
        scale = visit.page.evaluate("""() => { const l = document.getElementById('simplex')._fullLayout;
            return [l.xaxis._length/(l.xaxis.range[1] - l.xaxis.range[0]), l.xaxis.range[0], l.yaxis.range[1]] }""")
        unit, left, top = scale
        return [np.array(trace)*(1, -1)/unit + (left, top) for trace in places if trace]
    def expected(alpha):
        return [points[which == k] for model in (outputs(2.), outputs(.5))
                for points, which in [simplex_points(*model, (0, 1, 2), alpha)] for k in range(3)]
    def differ(alpha):
        places = drawn()
        if [len(p) for p in places] != [len(p) for p in expected(alpha)]: return [len(p) for p in places]
        return max(np.abs(a - b).max() for a, b in zip(places, expected(alpha), strict=True))
    def near(found): return isinstance(found, float) and found < .01
    rail = visit.page.locator('.slider-rail-touch-rect')
    rail.wait_for()
    eventually(lambda: differ(1), near, 'largest distance to the points of power 1')
    for alpha, at in ((4, .99), (.25, .01)):
        box = rail.bounding_box()
        visit.page.mouse.click(box['x'] + at*box['width'], box['y'] + box['height']/2)
        eventually(lambda alpha=alpha: differ(alpha), near, f'largest distance to the points of power {alpha:g}')
        assert visit.page.locator('.slider-label').first.text_content().endswith(f'= {alpha:g}') and differ(1) > .05
    visit.close()


def kill(process):
    "Kill a process and all its descendants at once, as a power cut does."
    family = [*psutil.Process(process.pid).children(recursive=True), process] if process.poll() is None else []
    for member in family: member.kill()
    process.wait()
    return bool(family)


GATE = '''
import os, time
real = os.replace
def replace(source, target, **options):
    with open(os.environ['SPY'], 'a') as file: file.write(f'{target}\\n')
    found = real(source, target, **options)
    gate = os.environ.get('GATE')
    while gate and str(target).endswith('result.json') and not os.path.exists(gate): time.sleep(.05)
    return found
os.replace = replace
'''


@pytest.fixture
def start(tmp_path):
    "A function that starts a narrowed run of Table 2's notebook; what is still running in the end is killed."
    started = []
    def start(spy, gate=''):
        started.append(command(tmp_path, spy, gate))
        return started[-1]
    yield start
    for process in started: kill(process)


def command(folder, spy, gate):
    "Table 2's notebook, narrowed. `spy` notes files that are put in place; a finished run waits until `gate` is there."
    (folder/'spy').mkdir(exist_ok=True)
    (folder/'spy'/'sitecustomize.py').write_text(GATE)
    path = os.pathsep.join([str(folder/'spy'), str(ROOT), *filter(None, [os.environ.get('PYTHONPATH')])])
    environment = {**os.environ, 'PYTHONPATH': path, 'SPY': str(folder/spy), 'CMIM_STORE': str(folder/'store'),
                   'GATE': str(gate)}
    pairs = [('defenses', 'ls, cmim'), ('seeds', 3), ('epochs', 4)]
    return subprocess.Popen([sys.executable, '-m', 'cmim_repro.report.page', 'table2', '--profile', 'smoke',
                             '--figures', str(folder/'figures'),
                             *(str(part) for pair in pairs for part in ('-p', *pair))],
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def put_in_place(folder, spy, file):
    "How often each run's `file` was put in place."
    return Counter(Path(line).parent.name for line in (folder/spy).read_text().splitlines() if Path(line).name == file)


def finished(folder):
    return {path.parent.name: (path.stat().st_mtime_ns, path.read_bytes())
            for path in (folder/'store').glob('*/result.json')}


def test_killed_then_started_twice_at_once_trains_nothing_twice(tmp_path, start):
    first = start('first', gate=tmp_path/'never') # it waits with its first finished runs until it is killed
    eventually(lambda: (first.poll(), sorted(finished(tmp_path))), lambda found: found[0] is not None or found[1],
               'finished runs', 300)
    assert kill(first), first.communicate()[0]
    before = finished(tmp_path)
    assert 0 < len(before) < 9 and not (tmp_path/'figures'/'smoke').exists()
    both = [start('again') for _ in range(2)]
    outputs = [child.communicate()[0] for child in both]
    assert [child.returncode for child in both] == [0, 0], outputs
    assert all('table2: done in' in text for text in outputs), outputs
    after = finished(tmp_path)
    assert len(after) == 9 and {name: after[name] for name in before} == before
    for file in ('run.json', 'result.json'):
        counts = put_in_place(tmp_path, 'again', file)
        if file == 'run.json': counts = {name: n for name, n in counts.items() if name not in before}
        assert counts == dict.fromkeys(set(after) - set(before), 1), file
    table = pd.read_csv(tmp_path/'figures'/'smoke'/'table2.csv').set_index('column')
    assert table['n'].to_dict() == {'ce': 3, 'ls': 3, 'cmim': 3}
    executed = json.loads((tmp_path/'figures'/'executed'/'smoke'/'run_table2.ipynb').read_text())
    assert all(cell['execution_count'] for cell in executed['cells'] if cell['cell_type'] == 'code')
    assert main(['--figures',
                 str(tmp_path/'figures')]) == 0 and 'smoke/table2.csv' in (tmp_path/'figures'/'index.html').read_text()
    assert not [p for p in (tmp_path/'figures'/'smoke').iterdir() if p.name.startswith('.')]


def makefile(folder, *sources):
    "A folder with the Makefile and invented notebooks table1, table2 ..., one for each source of a cell."
    (folder/'nbs').mkdir(parents=True)
    shutil.copy(ROOT/'Makefile', folder/'Makefile')
    for file in ('settings.ini', 'pyproject.toml', 'constraints.txt'): shutil.copy(ROOT/file, folder/file)
    shutil.copytree(ROOT/'cmim_repro', folder/'cmim_repro', ignore=shutil.ignore_patterns('__pycache__'))
    (folder/'.venv').mkdir()
    (folder/'.venv'/'.installed').touch()
    for number, source in enumerate(sources, 1):
        cells = [nbformat.v4.new_markdown_cell(f'# Table {number}: invented\n\n**What the paper claims.** Nothing.'),
                 nbformat.v4.new_code_cell("profile = ''\nstore = ''\nfigures = ''", metadata={'tags': ['parameters']}),
                 nbformat.v4.new_code_cell(source)]
        notebook = nbformat.v4.new_notebook(cells=cells,
                                            metadata={'kernelspec': {'name': 'python3', 'display_name': '',
                                                                     'language': 'python'}})
        nbformat.write(notebook, folder/'nbs'/f'run_table{number}.ipynb')


def make(folder, *arguments, **options):
    "Start make there, in a process group of its own, as a shell does."
    environment = {**os.environ, 'PYTHONPATH': str(folder), 'MAKEFLAGS': ''}
    return subprocess.Popen(['make', f'BIN={Path(sys.executable).parent}', *arguments], cwd=folder, env=environment,
                            text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True, **options)


def test_a_failed_notebook_is_named_and_stops_no_other(tmp_path):
    makefile(tmp_path, "raise ValueError('no such data')", "print('well')", "print(store)")
    output = (process := make(tmp_path, '-j2', 'tables', 'PROFILE=smoke',
                              'ARGS=-p store here')).communicate(timeout=300)[0]
    lines = output.splitlines()
    assert process.returncode == 2 and 'table1: failed: ValueError: no such data' in lines, output
    assert any(line.startswith('table2: done in') for line in lines) and any(line.startswith('table3: done in')
                                                                             for line in lines), output
    assert 'error: table1 failed; the reasons are above.' in lines, output
    executed = tmp_path/'figures'/'executed'/'smoke'
    assert sorted(p.name for p in executed.iterdir()) == ['run_table1.failed',
                                                          *(f'run_table{n}.ipynb' for n in (1, 2, 3))]
    assert 'here' in (executed/'run_table3.ipynb').read_text() and (tmp_path/'figures'/'index.html').exists()


ALONE = """
import time
from pathlib import Path
def note(what): Path({folder!r}, f'{name}.{{what}}').write_text(str(time.time()))
note('begin'); time.sleep({seconds}); note('end')
"""


def test_table_9_runs_when_all_others_are_done(tmp_path):
    makefile(tmp_path, *(ALONE.format(folder=str(tmp_path), name=f'table{n}', seconds=1 if n < 9 else 0)
                         for n in (1, 2)), *['pass']*6,
             ALONE.format(folder=str(tmp_path), name='table9', seconds=0))
    for n in range(3, 9): (tmp_path/'nbs'/f'run_table{n}.ipynb').unlink()
    process = make(tmp_path, '-j3', 'tables', 'PROFILE=smoke')
    assert process.wait(300) == 0, process.communicate()[0]
    def when(name, what): return float((tmp_path/f'{name}.{what}').read_text())
    assert when('table9', 'begin') > max(when('table1', 'end'), when('table2', 'end'))


SLEEPER = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])
open({file!r}, 'w').write(str(child.pid))
time.sleep(600)
"""


@pytest.mark.parametrize('number, group', [(signal.SIGINT, True), (signal.SIGTERM, False), (signal.SIGKILL, False)],
                         ids=['ctrl-c', 'terminate', 'kill'])
def test_a_stopped_make_leaves_no_process_and_no_half_notebook(tmp_path, number, group):
    makefile(tmp_path, *(SLEEPER.format(file=str(tmp_path/f'started{n}')) for n in (1, 2)))
    process = make(tmp_path, '-j2', 'tables', 'PROFILE=smoke')
    family = []
    try:
        def started(): return [path for n in (1, 2) if (path := tmp_path/f'started{n}').exists() and path.read_text()]
        eventually(lambda: (process.poll(), len(started())), lambda found: found[0] is not None or found[1] == 2,
                   'notebooks that sleep', 300)
        assert process.poll() is None, process.communicate()[0]
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) >= 6, family # for each notebook the command, its kernel, and the kernel's child
        os.killpg(process.pid, number) if group else process.send_signal(number)
        assert process.wait(60) != 0
        assert not psutil.wait_procs(family, timeout=60)[1]
        assert {p.parent for p in tmp_path.rglob('run_table*.ipynb*')} == {tmp_path/'nbs'}
    finally:
        for member in family:
            try: member.kill()
            except psutil.NoSuchProcess: pass
        kill(process)


@pytest.mark.parametrize('arguments, words', [
    (['table11'], "Unknown table or figure 'table11'; accepted: table1, table2"),
    (['table1', '--profile', 'fast'], "Unknown profile 'fast'; accepted: paper, mini, quick, smoke"),
    (['table1', '-p', 'sedes', '3'], "Unknown parameter 'sedes'; accepted: ")], ids=['name', 'profile', 'parameter'])
def test_bad_arguments_end_with_one_sentence(capsys, arguments, words):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith('error: ') and words in captured.err and len(captured.err.splitlines()) == 1


EVIL = '<script>alert(1)</script><img src=x onerror="alert(1)"><td onclick="alert(1)">'


def test_tables_and_provenance_are_shown_not_obeyed(tmp_path):
    "Results that somebody else made, with HTML in every place."
    folder = tmp_path/'figures'/'quick'
    folder.mkdir(parents=True)
    plain = f'<table><caption>{EVIL}" onmouseover="alert(1)</caption><tbody><tr><td>1 &lt; 2{EVIL}</td></tr></tbody></table><p class="note">{EVIL}</p>'
    (folder/'table1.html').write_text(plain, encoding='utf-8')
    (folder/'table2.md').write_text(f'**{EVIL}**\n\n| a | {EVIL} |\n|---|---|\n| 1 | {EVIL} |\n\n{EVIL}\n', encoding='utf-8')
    (folder/'figure1.png').write_bytes(b'')
    (folder/'figure1.provenance.txt').write_text(EVIL, encoding='utf-8')
    (folder/'table1.answer.json').write_text(json.dumps({'verdict': EVIL, 'because': EVIL}), encoding='utf-8')
    text = page_html(tmp_path/'figures', ROOT/'nbs', tmp_path/'none')
    for tag in ('<script', '<img src=x', '<td onclick'): assert tag not in text, tag
    assert '" onmouseover' not in text and '1 &lt; 2' in text and '&lt;script&gt;' in text


def test_files_that_a_killed_process_was_writing_are_removed_by_the_next(tmp_path, monkeypatch):
    "By a notebook at its end, by the command that runs it, and by the page; a file that is being written stays."
    left = ('.table1.csvab12_xyz', '.figure3_a.provenance.txt0123abcd', '.table1.answer.json_______a', '.run_table1.ipynbabcdefgh',
            '.run_table1.failed12345678', '.index.htmlabcdefgh')
    kept = ('table1.csv', '.hidden', '.my.configuration', '.table2.csvabcdefgh')
    def spoil(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name in (*left, *kept): (folder/name).touch()
        for name in (*left, *kept[:3]): os.utime(folder/name, (1e9, 1e9))
    def there(folder): return {path.name for path in folder.iterdir()} - {'index.html', 'run_table1.failed'}

    figures = tmp_path/'figures'
    exhibit = Exhibit('figure3', {'profile': 'smoke', 'store': str(tmp_path/'store'), 'figures': str(figures/'smoke')})
    monkeypatch.setattr(Exhibit, 'note', 'Nothing.')
    ways = {figures/'smoke': exhibit.provenance, figures/'executed'/'smoke': lambda: draw('x.ipynb', figures/'executed'/'smoke'/'run_table1.ipynb', {}, print),
            figures: lambda: write_page(figures, tmp_path/'nbs', tmp_path/'results')}
    for folder, way in ways.items():
        spoil(folder)
        way()
        assert there(folder) - {'smoke', 'executed'} == set(kept), folder
