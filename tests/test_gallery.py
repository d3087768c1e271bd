"""The gallery and Figure 2's page open from disk in a browser without network; the command that fills them may be killed, started again, and started twice."""
import json
import os
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

from cmim_repro.report.figure_data import save_picture
from cmim_repro.report.figures import cmi_curves, simplex_figure, simplex_html, simplex_points
from cmim_repro.report.formats import Table, runs_cell, save_table
from cmim_repro.report.gallery import FIGURES, TABLES, main

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
FLAGS = ['--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-component-update', '--disable-sync']
ALPHAS = (.25, 1, 4)


@pytest.fixture(scope='module')
def browser():
    if not CHROMIUM: pytest.skip('there is no Chromium on PATH; apt-get install chromium, or .ci/run')
    api = pytest.importorskip('playwright.sync_api', reason="Playwright is not installed; pip install '.[dev]'")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, chromium_sandbox=False, args=FLAGS)
        yield browser
        browser.close()


class Visit:
    "A page opened from disk, with everything that went wrong on it; whatever is not a file is refused and noted."
    def __init__(self, browser, path, **options):
        self.errors, self.refused, self.page = [], [], browser.new_page(**options)
        self.page.route('**/*', self.answer)
        self.page.on('console', lambda message: self.errors.append(message.text) if message.type in ('error', 'warning') else None)
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
    place, table = folder/'quick', Table('Accuracy', ('Model',), tuple('abcdefghij'), ((('CMIM',), (runs_cell([49., 50.], 51.2, ls_mean=52.),)*10),), 'Made by `a test`.')
    for name in TABLES:
        if name != 'table3': save_table(table, place/name)
    save_table(table, place/'models')
    for name in FIGURES:
        picture = simplex_figure(models, (0, 1, 2)) if name == 'figure2' else cmi_curves([0, 1, 2], {'ce': [0, 1, 2]})
        save_picture(picture, pd.DataFrame({'alpha': [1]}), 'Made by `a test`.', place/name)
    (place/'figure2.html').write_text(simplex_html(models, (0, 1, 2), ALPHAS))
    assert main(['--figures', str(folder)]) == 0
    return folder


def test_the_gallery_opens_from_disk_without_network(browser, figures):
    visit = Visit(browser, figures/'index.html')
    page = visit.page
    page.evaluate("document.querySelectorAll('img').forEach(image => image.loading = 'eager')")
    page.wait_for_function("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    assert page.locator('img').count() >= len(FIGURES) and page.locator('#table5 [data-shelf=quick] table').count() == 1
    assert page.locator('[data-shelf=quick]').count() == len(TABLES) + len(FIGURES) - 1
    assert 'make tables PROFILE=quick' in page.locator('#table3 .missing').inner_text() and page.locator('#table3 [data-shelf=quick]').count() == 0
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
    visit.page.get_by_label('mini, committed').check(force=True)
    committed = {shown.nth(i).get_attribute('data-shelf') for i in range(shown.count())}
    assert 0 < shown.count() < everything and committed == {'mini-committed'}
    visit.close()


def test_the_gallery_fits_a_telephone(browser, figures):
    visit = Visit(browser, figures/'index.html', viewport={'width': 380, 'height': 800})
    assert visit.page.evaluate('document.documentElement.scrollWidth') <= 380
    visit.close()


def test_the_slider_of_figure_2_moves_the_points(browser, figures):
    visit = Visit(browser, figures/'quick'/'figure2.html')
    def drawn():
        traces = visit.page.evaluate("document.getElementById('simplex').data.filter(t => t.mode == 'markers').map(t => [Array.from(t.x), Array.from(t.y)])")
        return [np.array(trace).T for trace in traces]
    def expected(alpha):
        return [points[which == k] for model in (outputs(2.), outputs(.5)) for points, which in [simplex_points(*model, (0, 1, 2), alpha)] for k in range(3)]
    def on_screen():
        return visit.page.eval_on_selector_all('.scatterlayer .point', "all => all.map(point => point.getAttribute('transform'))")
    def differ(alpha): return max(np.abs(a - b).max() for a, b in zip(drawn(), expected(alpha), strict=True))
    rail = visit.page.locator('.slider-rail-touch-rect')
    rail.wait_for()
    start = on_screen()
    assert differ(1) < 1e-4
    for alpha, at in ((4, .99), (.25, .01)):
        box = rail.bounding_box()
        visit.page.mouse.click(box['x'] + at*box['width'], box['y'] + box['height']/2)
        visit.page.wait_for_function(f"document.querySelector('.slider-label').textContent.endsWith('= {alpha:g}')")
        assert differ(alpha) < 1e-4 and differ(1) > .05
        visit.page.wait_for_timeout(700)
        assert sum(a != b for a, b in zip(start, on_screen(), strict=True)) > 90
    visit.close()


SPY = '''
import os
real = os.replace
def replace(source, target, **options):
    with open(os.environ['SPY'], 'a') as file: file.write(f'{target}\\n')
    return real(source, target, **options)
os.replace = replace
'''


def kill(process):
    "Kill a process and all its descendants at once, as a power cut does."
    family = [*psutil.Process(process.pid).children(recursive=True), process] if process.poll() is None else []
    for member in family: member.kill()
    process.wait()
    return bool(family)


@pytest.fixture
def start(tmp_path):
    "A function that starts a narrowed `make tables`; what is still running in the end is killed."
    started = []
    def start(spy):
        started.append(command(tmp_path, spy))
        return started[-1]
    yield start
    for process in started: kill(process)


def command(folder, spy):
    "A narrowed `make tables`; every file that it or its children put in place is noted in `spy`."
    (folder/'spy').mkdir(exist_ok=True)
    (folder/'spy'/'sitecustomize.py').write_text(SPY)
    path = os.pathsep.join([str(folder/'spy'), str(ROOT), *filter(None, [os.environ.get('PYTHONPATH')])])
    environment = {**os.environ, 'PYTHONPATH': path, 'SPY': str(folder/spy), 'CMIM_STORE': str(folder/'store')}
    pairs = [('defenses', 'ls, cmim'), ('seeds', 3), ('epochs', 4)]
    return subprocess.Popen([sys.executable, '-m', 'cmim_repro.report.gallery', 'table2', '--profile', 'smoke', '--figures', str(folder/'figures'),
                             *(str(part) for pair in pairs for part in ('-p', *pair))],
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def put_in_place(folder, spy, file):
    "How often each run's `file` was put in place."
    return Counter(Path(line).parent.name for line in (folder/spy).read_text().splitlines() if Path(line).name == file)


def finished(folder): return {path.parent.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in (folder/'store').glob('*/result.json')}


def test_killed_then_started_twice_at_once_trains_nothing_twice(tmp_path, start):
    first = start('first')
    while first.poll() is None and not finished(tmp_path): time.sleep(.05)
    assert kill(first)
    before = finished(tmp_path)
    assert 0 < len(before) < 9 and not (tmp_path/'figures'/'index.html').exists()
    both = [start('again') for _ in range(2)]
    outputs = [child.communicate()[0] for child in both]
    assert [child.returncode for child in both] == [0, 0] and all('table2: done in' in text and 'Gallery: ' in text for text in outputs), outputs
    after = finished(tmp_path)
    assert len(after) == 9 and {name: after[name] for name in before} == before
    for file in ('run.json', 'result.json'): assert put_in_place(tmp_path, 'again', file) == {name: 1 for name in set(after) - set(before)}, file
    table = pd.read_csv(tmp_path/'figures'/'smoke'/'table2.csv').set_index('column')
    assert table['n'].to_dict() == {'ce': 3, 'ls': 3, 'cmim': 3}
    executed = json.loads((tmp_path/'figures'/'executed'/'smoke'/'run_table2.ipynb').read_text())
    assert all(cell['execution_count'] for cell in executed['cells'] if cell['cell_type'] == 'code')
    assert 'smoke/table2.csv' in (tmp_path/'figures'/'index.html').read_text()
    assert not [p for p in (tmp_path/'figures'/'smoke').iterdir() if p.name.startswith('.')]


STOPPABLE = """
import signal, sys
from cmim_repro.report.gallery import Runner, run_all
runner = Runner({}, sys.argv[1] + '/executed', sys.argv[1])
signal.signal(signal.SIGTERM, runner.stop)
run_all(runner, ['table1', 'table2'])
"""


def test_a_stopped_command_leaves_no_process_and_no_half_notebook(tmp_path):
    cells = [nbformat.v4.new_code_cell("profile = ''", metadata={'tags': ['parameters']}),
             nbformat.v4.new_code_cell(f"import time\nopen({str(tmp_path/'started')!r}, 'w').close()\ntime.sleep(600)")]
    notebook = nbformat.v4.new_notebook(cells=cells, metadata={'kernelspec': {'name': 'python3', 'display_name': ''}})
    for name in ('table1', 'table2'): nbformat.write(notebook, tmp_path/f'run_{name}.ipynb')
    process = subprocess.Popen([sys.executable, '-c', STOPPABLE, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        while process.poll() is None and not (tmp_path/'started').exists(): time.sleep(.05)
        family = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        output, errors = process.communicate(timeout=300)
        assert 'KeyboardInterrupt' in errors and process.returncode and len(family) >= 2 and 'table' not in output, (output, errors)
        assert not psutil.wait_procs(family, timeout=30)[1] and not (tmp_path/'executed').exists()
    finally: kill(process)


@pytest.mark.parametrize('arguments, words', [
    (['table11'], "Unknown table or figure 'table11'; accepted: tables, figures, table1"),
    (['table1', '--profile', 'fast'], "Unknown profile 'fast'; accepted: paper, mini, quick, smoke"),
    (['table1', '-p', 'sedes', '3'], "Unknown parameter 'sedes'; accepted: profile")], ids=['name', 'profile', 'parameter'])
def test_bad_arguments_end_with_one_sentence(capsys, arguments, words):
    handler = signal.getsignal(signal.SIGTERM)
    assert main(arguments) == 2
    signal.signal(signal.SIGTERM, handler)
    captured = capsys.readouterr()
    assert captured.err.startswith('error: ') and words in captured.err and len(captured.err.splitlines()) == 1
