"""The chain of SCM as runs: each stage is trained on the answers of the stage before it."""
import math

import pytest
import torch

from cmim_repro.attacks.scm import SCM, mixture
from cmim_repro.experiments.execution import answers_of, execute, load_data
from cmim_repro.experiments.runs import Plan, chain_answers, earlier_stages, heard_by, make_run, victim_of
from cmim_repro.experiments.store import Store
from cmim_repro.lab.training import Recipe, Settings

COMMON = {'recipe': Recipe(epochs=1, batch_size=32, lr=.05, schedule='cosine'), 'data_options': {'per_class': 8, 'test_per_class': 5}}
VICTIM = make_run('digits', 'cnn_tiny', 'ce', **COMMON)
SETTINGS = Settings(device='cpu')


def scm(**options): return make_run('digits', 'cnn_tiny', 'scm', teacher=VICTIM, **COMMON, **options)


def silence(store, run):
    "Zero all weights of a run: whatever it is shown, it answers the uniform distribution."
    weights = store.tensors(run, 'weights.safetensors')
    store.save_tensors(run, 'weights.safetensors', {name: torch.zeros_like(w) for name, w in weights.items()})


@pytest.fixture(scope='module')
def chain(tmp_path_factory):
    store, last = Store(tmp_path_factory.mktemp('scm')), scm(stages=2)
    execute(Plan.of([last.teacher]), store, SETTINGS)
    return store, last


def test_a_plan_holds_the_whole_chain_in_order():
    last = scm(stages=3)
    assert [run.options.get('stages') for run in Plan.of([last]).runs] == [None, 1, 2, 3]
    assert [[run.options.get('stages') for run in cohort] for cohort in Plan.of([last]).cohorts()] == [[None], [1], [2], [3]]
    assert len({run.id for run in Plan.of([last]).runs}) == 4 and victim_of(last) == VICTIM


def test_chains_share_what_they_have_in_common_and_nothing_else():
    assert len(Plan.of([scm(stages=2), scm(stages=3)]).runs) == 4
    assert len(Plan.of([scm(stages=2), scm(stages=2, imitate='mean')]).runs) == 5
    assert earlier_stages(scm(stages=3, temperature=2)) == [scm(stages=1, temperature=2), scm(stages=2, temperature=2)]


def test_who_listens_to_others_is_in_another_cohort():
    "A plain student of stage 2 and the third stage of a mean have the same teacher, but do not hear the same."
    last = scm(stages=3, imitate='mean')
    plain = make_run('digits', 'cnn_tiny', 'kd', teacher=last.teacher, **COMMON)
    assert plain.teacher == last.teacher and heard_by(plain) != heard_by(last)
    assert [run.id for run in Plan.of([last, plain]).cohorts()[-1]] == [plain.id]


def test_a_stage_is_told_what_the_stage_before_it_says(chain, monkeypatch):
    store, last = chain
    silence(store, last.teacher)
    heard, loss = [], SCM.loss
    def listen(self, student_logits, teacher_log_probs, labels, epoch):
        heard.append((self.stages, teacher_log_probs))
        return loss(self, student_logits, teacher_log_probs, labels, epoch)
    monkeypatch.setattr(SCM, 'loss', listen)
    execute(Plan.of([last]), store, SETTINGS)
    assert store.finished(last) and {stages for stages, _ in heard} == {2}
    for _, told in heard: torch.testing.assert_close(told, torch.full_like(told, -math.log(10)))
    first = answers_of(last.teacher, store, load_data(last))
    images = next(iter(load_data(last).batches('test', 20)))[0]
    with torch.no_grad(): assert not torch.allclose(answers_of(VICTIM, store, load_data(last))(images), first(images), atol=1e-3)


def test_the_mean_is_over_all_stages_so_far(chain):
    store, _ = chain
    last = scm(stages=3, imitate='mean')
    execute(Plan.of([last.teacher]), store, SETTINGS)
    silence(store, last.teacher)
    data = load_data(last)
    images = next(iter(data.batches('test', 20)))[0]
    with torch.no_grad():
        told = chain_answers(last, lambda run: answers_of(run, store, data))(images)
        first = answers_of(earlier_stages(last)[0], store, data)(images)
        torch.testing.assert_close(told, mixture([first, torch.full_like(first, -math.log(10))]))
        assert not torch.allclose(told, first, atol=1e-3)
