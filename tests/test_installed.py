"""Installed without a checkout: sentences, no strange folders, and nothing required that nobody imports."""
import re
import tomllib
from pathlib import Path

import pytest

from cmim_repro.core import Invalid, default_store
from cmim_repro.experiments.execution import read_settings
from cmim_repro.report.page import main

ROOT = Path(__file__).parents[1]
COMMANDS = {'jupyterlab'} # started, not imported
NAMES = {'scikit-learn': 'sklearn', 'pillow': 'PIL'}


def test_whatever_is_required_is_imported():
    text = '\n'.join(path.read_text(encoding='utf-8') for path in (ROOT/'cmim_repro').rglob('*.py'))
    required = tomllib.loads((ROOT/'pyproject.toml').read_text(encoding='utf-8'))['project']['dependencies']
    for name in {re.match(r'[\w-]+', line)[0] for line in required} - COMMANDS:
        assert re.search(rf'^\s*(import|from) {NAMES.get(name, name)}\b', text, re.M), f'{name} is required, but nobody imports it'


def test_the_page_without_a_checkout_is_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr('cmim_repro.report.page.project_root', lambda: tmp_path)
    for arguments in ([], ['table1']):
        assert main(arguments) == 2
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
