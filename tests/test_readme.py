"""What the README shows is what the committed results hold, and the commands it names exist."""
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT/'README.md').read_text()


@pytest.mark.parametrize('name', re.findall(r'<!-- (\S+\.md) -->', README))
def test_tables_are_the_committed_ones(name):
    shown = README.split(f'<!-- {name} -->')[1].split('<!-- end -->')[0].strip()
    assert shown == (ROOT/name).read_text().strip()


def test_there_is_a_table(): assert re.findall(r'<!-- (\S+\.md) -->', README)


def test_make_targets_exist():
    makefile = (ROOT/'Makefile').read_text()
    for target in re.findall(r'`?make ([a-z][a-z0-9-]*)', README): assert re.search(rf'^{target}:', makefile, re.M), target


def test_links_lead_somewhere():
    for target in re.findall(r'\]\(([^)#]+)\)', README): assert (ROOT/target).exists(), target
