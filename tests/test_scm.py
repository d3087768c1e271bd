"""The chain of SCM as runs: each stage is trained on the answers of the stage before it."""
import math

import pytest
import torch

from cmim_repro.attacks.scm import SCM, mixture
from cmim_repro.experiments.execution import answers_of, execute, load_data
from cmim_repro.experiments.runs import Plan, earlier_stages, heard_by, make_run, victim_of
from cmim_repro.experiments.store import Store
from cmim_repro.lab.training import Recipe, Settings

COMMON = {'recipe': Recipe(epochs=1, batch_size=32, lr=.05, schedule='cosine', augment='none'), 'data_options': {'per_class': 8, 'test_per_class': 5}}
VICTIM = make_run('digits', 'cnn_tiny', 'ce', **COMMON)
SETTINGS = Settings(device='cpu')


def scm(**options): return make_run('digits', 'cnn_tiny', 'scm', teacher=VICTIM, **COMMON, **options)


def silence(store, run):
    "Zero all weights of a run: whatever it is shown, it answers the uniform distribution."
    weights = store.tensors(run, 'weights.safetensors')
    store.save_tensors(run, 'weights.safetensors', {name: torch.zeros_like(w) for name, w in weights.items()})
    store.finish(run, store.result(run))


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


def listened(monkeypatch):
    "A list that fills with (stage, what it is told) while students train."
    heard, loss = [], SCM.loss

    def listen(self, student_logits, teacher_log_probs, labels, epoch):
        heard.append((self.stages, teacher_log_probs.clone())) # the loop writes the next batch to the same place
        return loss(self, student_logits, teacher_log_probs, labels, epoch)
    monkeypatch.setattr(SCM, 'loss', listen)
    return heard


def test_a_stage_is_told_what_the_stage_before_it_says(chain, monkeypatch):
    store, last = chain
    silence(store, last.teacher)
    heard = listened(monkeypatch)
    execute(Plan.of([last]), store, SETTINGS)
    assert store.finished(last) and {stages for stages, _ in heard} == {2}
    for _, told in heard: torch.testing.assert_close(told, torch.full_like(told, -math.log(10)))


def test_the_mean_is_over_all_stages_so_far(chain, monkeypatch):
    "Stage 2 is silenced, so that stage 3 is told the mean of stage 1 and the uniform distribution; without augmentation every image is seen once an epoch."
    store, _ = chain
    last = scm(stages=3, imitate='mean')
    execute(Plan.of([last.teacher]), store, SETTINGS)
    silence(store, last.teacher)
    heard = listened(monkeypatch)
    execute(Plan.of([last]), store, SETTINGS)
    assert {stages for stages, _ in heard} == {3}
    data = load_data(last)
    first = answers_of(earlier_stages(last)[0], store, data)
    with torch.no_grad(): said = torch.cat([first(images) for images, _, _ in data.batches('train', 50)])
    told = torch.cat([answers for _, answers in heard]).exp().sum(0)
    torch.testing.assert_close(told, mixture([said, torch.full_like(said, -math.log(10))]).exp().sum(0), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(told, said.exp().sum(0), rtol=1e-2)
