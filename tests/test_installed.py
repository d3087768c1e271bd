"""Installed without a checkout: sentences, no strange folders, and nothing required that nobody imports."""
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from cmim_repro.core import Invalid, default_store
from cmim_repro.experiments.execution import read_settings
from cmim_repro.report import pack, plan
from cmim_repro.report.page import main

ROOT = Path(__file__).parents[1]
COMMANDS = {'jupyterlab'} # started, not imported
NAMES = {'scikit-learn': 'sklearn', 'pillow': 'PIL'}


def test_whatever_is_required_is_imported():
    text = '\n'.join(path.read_text(encoding='utf-8') for path in (ROOT/'cmim_repro').rglob('*.py'))
    required = tomllib.loads((ROOT/'pyproject.toml').read_text(encoding='utf-8'))['project']['dependencies']
    for name in {re.match(r'[\w-]+', line)[0] for line in required} - COMMANDS:
        assert re.search(rf'^\s*(import|from) {NAMES.get(name, name)}\b', text, re.M), f'{name} is required, but nobody imports it'


def test_a_wheel_holds_every_printed_value(tmp_path):
    "Built, unpacked and imported elsewhere: a cell of Table 1 is there, and so is every file that is no code."
    source, place = tmp_path/'source', tmp_path/'unpacked'
    source.mkdir()
    for name in ('pyproject.toml', 'README.md', 'LICENSE'): shutil.copy(ROOT/name, source)
    shutil.copytree(ROOT/'cmim_repro', source/'cmim_repro', ignore=shutil.ignore_patterns('__pycache__'))
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, '-c', build, str(tmp_path)], cwd=source, check=True, capture_output=True)
    [wheel] = tmp_path.glob('*.whl')
    with zipfile.ZipFile(wheel) as archive: archive.extractall(place)
    def files(root): return {path.relative_to(root) for path in (root/'cmim_repro').rglob('*') if path.is_file() and path.suffix != '.pyc'}
    assert files(source) == files(place)
    code = "from cmim_repro.report.paper import paper_folder, printed; print(paper_folder(), printed(10, omega=15))"
    said = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, env={**os.environ, 'PYTHONPATH': str(place)}, check=True, capture_output=True, text=True)
    assert said.stdout.split() == [str(place/'cmim_repro'/'report'/'printed'), '72.55']


def test_the_page_without_a_checkout_is_one_sentence(tmp_path, monkeypatch, capsys):
    for module in ('page', 'notebooks'): monkeypatch.setattr(f'cmim_repro.report.{module}.project_root', lambda: tmp_path)
    for door, arguments in ((main, []), (main, ['table1']), (plan.main, ['table1']), (pack.main, ['table1', '--out', str(tmp_path)])):
        assert door(arguments) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and 'run inside a checkout' in lines[0]


def test_the_store_of_a_notebook_folder_is_the_checkouts(tmp_path, monkeypatch):
    (tmp_path/'nbs').mkdir()
    (tmp_path/'settings.ini').touch()
    for name in ('CMIM_STORE', 'IN_TEST'): monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr('cmim_repro.core.project_root', lambda: tmp_path/'nbs')
    assert default_store() == tmp_path/'data'/'runs'


def test_compiling_without_a_compiler_is_refused(monkeypatch):
    monkeypatch.setattr('shutil.which', lambda name: None)
    with pytest.raises(Invalid, match='no C.. compiler'): read_settings('cpu', 'compile=True')
    assert not read_settings('cpu', 'compile=False').compile
