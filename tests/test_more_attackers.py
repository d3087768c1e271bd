"""Mixup and extra: formulas written out number by number, questions that are really asked, and labels that are really missing."""
import json
import math
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from cmim_repro.attacks.core import attack
from cmim_repro.attacks.extra import ANSWERS, labelled_images
from cmim_repro.core import Invalid, keyed_generator
from cmim_repro.defenses.ls import EPSILONS
from cmim_repro.experiments.cost import operations
from cmim_repro.experiments.execution import execute
from cmim_repro.experiments.runs import Plan, make_run
from cmim_repro.experiments.store import Store
from cmim_repro.lab.data.core import dataset
from cmim_repro.lab.processes import end_together
from cmim_repro.lab.training import Learner, Recipe, Settings, initialised, mixtures, train
from cmim_repro.report.paper import ATTACKS, label

CPU, RECIPE = Settings(device='cpu'), Recipe(epochs=3, batch_size=64, lr=.02, schedule='cosine')
CASES = [(5, 3, 1.), (8, 10, 3.), (6, 2, 20.), (12, 4, .1)]


def case(B, C, scale, seed=0, zeros=False):
    "Logits, answers, mixed labels and labels."
    generator = torch.Generator().manual_seed(1000*B + 10*C + seed)
    student, teacher = scale*torch.randn(2, B, C, generator=generator, dtype=torch.float64)
    if zeros: teacher = teacher.masked_fill(teacher < teacher.median(1, keepdim=True).values, -torch.inf)
    first, second = torch.randint(C, (2, B), generator=generator)
    kept = .5 + .5*torch.rand(B, 1, generator=generator, dtype=torch.float64)
    mixed = kept*F.one_hot(first, C) + (1 - kept)*F.one_hot(second, C)
    return student, teacher.log_softmax(1), mixed, first


# The formulas again, in plain numbers: probabilities instead of logarithms, loops instead of tensors.

def softened(row, power):
    raised = [p**power if p > 0 else 0. for p in row]
    return [p/sum(raised) for p in raised]


def soft(scores): return softened([math.exp(s - max(scores)) for s in scores], 1)
def cross(target, model): return -sum(t*math.log(m) for t, m in zip(target, model, strict=True) if t > 0)


def divergence(z, p, T):
    target = softened(p, 1/T)
    return T**2*(cross(target, soft([s/T for s in z])) - cross(target, target))


def mixup(logits, answers, mixed, weight, temperature):
    rows = [(1 - weight)*cross(t, soft(z)) + weight*divergence(z, p, temperature) for z, p, t in zip(logits, answers, mixed, strict=True)]
    return sum(rows)/len(rows)


def extra(logits, answers, labels, known, how, weight, temperature):
    total, count = 0., 0
    for z, p, y, has in zip(logits, answers, labels, known, strict=True):
        q, apart = soft(z), divergence(z, p, temperature)
        if not has and how == 'none': continue
        count += 1
        if has: total += (1 - weight)*-math.log(q[y]) + weight*apart
        else: total += apart if how == 'probabilities' else -math.log(q[max(range(len(p)), key=lambda k: p[k])])
    return total/max(count, 1)


def told(options, labels, C, indices=None):
    "`extra`, which has been told what it sees."
    made = attack('extra', train_labels=torch.arange(20*C) % C if indices is None else labels, **options)
    made.observe(None, labels, torch.arange(len(labels)) if indices is None else indices)
    return made


@pytest.mark.parametrize('zeros', [False, True])
@pytest.mark.parametrize('B, C, scale', CASES)
@pytest.mark.parametrize('weight, temperature', [(.9, 4), (.5, 1), (0, 2), (1, .5)])
def test_mixup_number_by_number(weight, temperature, B, C, scale, zeros):
    student, teacher, mixed, _ = case(B, C, scale, zeros=zeros)
    expected = mixup(student.tolist(), teacher.exp().tolist(), mixed.tolist(), weight, temperature)
    thief = attack('mixup', weight=weight, temperature=temperature)
    assert thief(student, teacher, mixed).item() == pytest.approx(expected, rel=1e-9, abs=1e-10)
    assert thief(student.float(), teacher.float(), mixed.float()).item() == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize('zeros', [False, True])
@pytest.mark.parametrize('B, C, scale', CASES)
@pytest.mark.parametrize('weight, temperature', [(.9, 4), (.5, 1), (0, 2), (1, .5)])
@pytest.mark.parametrize('how', ANSWERS)
def test_extra_number_by_number(how, weight, temperature, B, C, scale, zeros):
    student, teacher, _, labels = case(B, C, scale, zeros=zeros)
    thief = told({'answers': how, 'weight': weight, 'temperature': temperature}, labels, C)
    known = thief.known[:B].tolist()
    expected = extra(student.tolist(), teacher.exp().tolist(), labels.tolist(), known, how, weight, temperature)
    assert thief(student, teacher, labels).item() == pytest.approx(expected, rel=1e-9, abs=1e-10)
    thief.observe(None, labels, torch.arange(B))
    assert thief(student.float(), teacher.float(), labels).item() == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_the_defaults_are_those_that_the_notebooks_state():
    assert attack.options('mixup') == {'weight': .9, 'temperature': 4., 'mixing': 1.}
    assert attack.options('extra') == {'answers': 'probabilities', 'labelled': .5, 'weight': .9, 'temperature': 4.}


@pytest.mark.parametrize('name', ['mixup', 'extra'])
def test_tuned_settings_are_as_many_as_the_reference_has_and_none_is_a_control(name):
    choices = attack.note(name, 'tuned')
    assert len(choices) == len({str(choice) for choice in choices}) == len(EPSILONS)
    for choice in choices:
        attack(name, **choice, **({'train_labels': torch.arange(20) % 4} if name == 'extra' else {}))
        assert choice.get('answers') != 'none' and (name == 'extra' or choice['weight'] > 0)
    assert attack.note(name, 'grid') is None and label(name) != name and name not in ATTACKS


# Mixtures.

@given(B=st.integers(1, 40), a=st.sampled_from([1e-3, .2, 1., 50.]), step=st.integers(0, 999))
@settings(max_examples=40, deadline=None)
def test_a_mixture_is_two_images_of_the_batch_and_their_labels(B, a, step):
    images = torch.arange(B).float()[:, None, None, None]*torch.tensor([0., 1.])[:, None, None] + torch.tensor([1., 0.])[:, None, None]
    images = torch.cat([images, F.one_hot(torch.arange(B), B)[:, :, None, None].float()], 1) # which images are in it, and how much of each
    labels = torch.arange(B) % 4
    mixed, targets = mixtures(images, labels, 4, a, (3, 'mixing', 0, step))
    parts = mixed[:, 2:, 0, 0]
    assert (parts.diagonal() >= .5).all() and (parts > 0).sum(1).max() <= 2 and torch.allclose(parts.sum(1), torch.ones(B))
    torch.testing.assert_close(targets, parts @ F.one_hot(labels, 4).float())
    torch.testing.assert_close(mixed[:, 1, 0, 0], parts @ torch.arange(B).float(), rtol=1e-5, atol=1e-4)
    again, other = (mixtures(images, labels, 4, a, (3, 'mixing', 0, s))[0] for s in (step, step + 1))
    assert torch.equal(mixed, again) and (B < 12 or a < .1 or not torch.equal(mixed, other)) # a small a mixes nearly nothing


@pytest.mark.parametrize('a', [.2, 1., 4.])
def test_the_shares_are_those_of_a_folded_beta(a):
    images, labels = torch.zeros(1000, 1, 1, 1), torch.arange(1000)
    kept = torch.cat([mixtures(images, labels, 1000, a, (0, 'mixing', 0, step))[1].diagonal() for step in range(20)]).double()
    variance = 1/(4*(2*a + 1)) # of Beta(a, a)
    assert (kept - .5).square().mean().item() == pytest.approx(variance, rel=.03)


WEIGHTS = torch.randn(64, 10, generator=keyed_generator(0, 'box'))/4
def box(images): return (images.flatten(1) @ WEIGHTS).log_softmax(1)


def learner(name, data, folder=None, recipe=RECIPE, **options):
    facts = {'train_labels': data.labels('train'), 'seed': 1} if name == 'extra' else {}
    net = initialised(lambda: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)), 0)
    return Learner(name, net, attack(name, **options, **facts), recipe, folder=folder)


def same(one, other):
    for name, value in one.model.state_dict().items(): assert torch.equal(value, other.model.state_dict()[name]), name


def digits(per_class=32): return dataset('digits', per_class=per_class, test_per_class=5)


@pytest.mark.parametrize('augment', ['standard', 'none'])
def test_the_box_is_asked_about_what_the_student_sees(augment):
    "In every step, also where other attacks ask once."
    asked, seen, data = [], [], digits()
    def watched(images):
        asked.append(images.clone())
        return box(images)
    thief = learner('mixup', data, recipe=replace(RECIPE, augment=augment))
    thief.model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()) if module.training else None)
    train([thief], data, 0, watched, CPU)
    assert len(asked) == len(seen) == 3*5
    for question, images in zip(asked, seen, strict=True): assert torch.equal(question, images)
    plain = [images for images, _, _ in data.batches('train', 64, augment=augment, shuffle=True, seed=0, epoch=0)]
    assert not any(torch.equal(images, question) for images, question in zip(plain, asked, strict=False))


@pytest.mark.parametrize('augment', ['standard', 'none'])
def test_the_control_does_not_hear_the_box(augment):
    data, recipe = digits(), replace(RECIPE, augment=augment)
    one, other, informed = (learner('mixup', data, recipe=recipe, weight=w) for w in (0., 0., .5))
    train([one], data, 0, box, CPU)
    train([other, informed], data, 0, lambda images: box(-images), CPU)
    same(one, other)
    assert not torch.equal(one.model[1].weight, informed.model[1].weight)


class Stop(Exception): "Ends a run from outside."


@pytest.mark.parametrize('name, options', [('mixup', {}), ('extra', {}), ('extra', {'answers': 'none'})])
def test_alone_beside_another_and_stopped_inside_an_epoch(name, options, tmp_path):
    data = digits()
    alone, beside, other, again = (learner(name, data, folder, **options, **more) for folder, more in
                                   ((None, {}), (None, {}), (None, {'weight': .3}), (tmp_path, {})))
    cut = learner(name, data, tmp_path, **options)
    train([alone], data, 0, box, CPU)
    train([other, beside], data, 0, box, CPU)
    observe = cut.objective.observe
    def watched(*args):
        if (cut.epoch, cut.done) == (1, 3): raise Stop
        return observe(*args)
    cut.objective.observe = watched
    with pytest.raises(Stop): train([cut], data, 0, box, Settings(device='cpu', checkpoint_seconds=0., inside_seconds=0.))
    train([again], data, 0, box, CPU)
    same(alone, beside)
    same(alone, again)
    assert alone.history == again.history == beside.history


def _child(rank, world, place, micro_batch):
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{place}/meeting', rank=rank, world_size=world)
    torch.save(weights(micro_batch), place/f'{rank}.pt')
    end_together()


def weights(micro_batch=0):
    data, found = digits(), []
    for name, options in (('mixup', {}), ('mixup', {'mixing': .2}), *(('extra', {'answers': how}) for how in ANSWERS)):
        one = learner(name, data, recipe=replace(RECIPE, micro_batch=micro_batch), **options)
        train([one], data, 0, box, CPU)
        found.append([p.detach() for p in one.model.parameters()])
    return found


@pytest.mark.parametrize('world, micro_batch', [(2, 0), pytest.param(3, 7, marks=pytest.mark.slow)])
def test_several_processes_mix_the_same_pairs_and_miss_the_same_labels(tmp_path, world, micro_batch):
    mp.spawn(_child, (world, tmp_path, micro_batch), world)
    expected = weights()
    for rank in range(world): torch.testing.assert_close(torch.load(tmp_path/f'{rank}.pt'), expected, rtol=1e-3, atol=1e-5)


# Runs, and a process that is killed.

COMMON = {'recipe': Recipe(epochs=8, batch_size=32, lr=.05, schedule='cosine'), 'data_options': {'per_class': 40, 'test_per_class': 5}}
TEACHER = make_run('digits', 'cnn_tiny', 'ce', **COMMON)
PLAN = Plan.of([*(make_run('digits', 'cnn_tiny', 'mixup', teacher=TEACHER, weight=w, **COMMON) for w in (.9, .5)),
                make_run('digits', 'cnn_tiny', 'extra', teacher=TEACHER, **COMMON)])


def test_runs_with_the_same_mixing_are_a_cohort():
    runs = [make_run('digits', 'cnn_tiny', name, teacher=TEACHER, **options, **COMMON) for name, options in
            (('mixup', {}), ('mixup', {'weight': 0}), ('mixup', {'mixing': .2}), ('kd', {}), ('extra', {}))]
    found = [[runs.index(run) for run in cohort] for cohort in Plan.of(runs).check().cohorts()[1:]]
    assert found == [[0, 1], [2], [3, 4]]


def test_questions_about_mixtures_are_counted():
    still = {**COMMON, 'recipe': replace(COMMON['recipe'], augment='none')}
    asked = {(name, kind): operations(make_run('digits', 'cnn_tiny', name, teacher=TEACHER, **recipe))['teacher']
             for name in ('kd', 'mixup') for kind, recipe in (('still', still), ('moved', COMMON))}
    assert asked['mixup', 'still'] == asked['mixup', 'moved'] == asked['kd', 'moved'] == 8*asked['kd', 'still']


DOOMED = """
import os, signal, sys
from cmim_repro.experiments.execution import execute, read_plan
from cmim_repro.experiments.store import Store
from cmim_repro.lab.training import Settings, Learner
plan, store, victim, steps = sys.argv[1:]
step, left = Learner.step, [int(steps)]
def counted(self, *args):
    step(self, *args)
    left[0] -= self.name == victim
    if not left[0]: os.kill(os.getpid(), signal.SIGKILL)
Learner.step = counted
execute(read_plan(plan), Store(store), Settings(device='cpu', checkpoint_seconds=0., inside_seconds=0.))
"""


def finished(store): return {run.id: [(store.folder(run)/name).read_bytes() for name in ('metrics.jsonl', 'weights.safetensors')] for run in PLAN.runs}


def test_killed_and_resumed_is_bit_identical(tmp_path):
    whole, cut, lonely = (Store(tmp_path/name) for name in ('whole', 'cut', 'lonely'))
    plain = Settings(device='cpu')
    assert execute(PLAN, whole, plain) == []
    (tmp_path/'plan.json').write_text(json.dumps([run.to_dict() for run in PLAN.runs]))
    for which, steps in ((1, 30), (2, 25), (3, 50)): # of 104 in a run
        doomed = subprocess.run([sys.executable, '-c', DOOMED, str(tmp_path/'plan.json'), str(tmp_path/'cut'), PLAN.runs[which].name, str(steps)],
                                capture_output=True, text=True)
        assert doomed.returncode == -signal.SIGKILL, doomed.stderr[-1000:]
    assert execute(PLAN, cut, plain) == [] and finished(cut) == finished(whole)
    for run in PLAN.runs: assert execute(Plan.of([run]), lonely, plain) == []
    assert finished(lonely) == finished(whole)


# Labels that are not there.

@given(counts=st.lists(st.integers(0, 30), min_size=1, max_size=6), share=st.floats(.01, 1), seed=st.integers(0, 99), key=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_a_share_of_each_class_has_labels(counts, share, seed, key):
    if not sum(counts): counts = [1]
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(key))]
    known, more = (labelled_images(labels, s, seed) for s in (share, min(1., 1.5*share)))
    for y, count in enumerate(counts): assert known[labels == y].sum() == min(count, max(1, int(np.round(share*count))))
    assert not (known & ~more).any() and known.equal(labelled_images(labels, share, seed))


class Relabelled:
    "A data set whose training labels are other ones where `missing`."
    def __init__(self, data, missing): self.data, self.missing = data, missing
    def __getattr__(self, name): return getattr(self.data, name)
    def batches(self, split, *args, **options):
        for images, labels, places in self.data.batches(split, *args, **options):
            yield images, torch.where(self.missing[places], (labels + 3) % 10, labels) if split == 'train' else labels, places


@pytest.mark.parametrize('how', ANSWERS)
def test_a_missing_label_changes_no_bit(how):
    data = digits()
    one, other = (learner('extra', data, answers=how) for _ in range(2))
    train([one], data, 0, box, CPU)
    train([other], Relabelled(data, ~other.objective.known), 0, box, CPU)
    same(one, other)
    assert one.history[-1]['train_loss'] == other.history[-1]['train_loss']
    third = learner('extra', data, answers=how)
    train([third], Relabelled(data, third.objective.known), 0, box, CPU)
    assert not torch.equal(one.model[1].weight, third.model[1].weight)


@given(how=st.sampled_from(ANSWERS), zeros=st.booleans(), seed=st.integers(0, 999), shape=st.sampled_from(CASES))
@settings(max_examples=60, deadline=None)
def test_the_gradient_of_extra(how, zeros, seed, shape):
    "Finite; none on unlabelled rows of the control; blind to missing labels, to the order of rows and to the names of classes."
    (student, teacher, _, labels), (B, C, _) = case(*shape, seed, zeros), shape

    def pushed(rows=torch.arange(B), names=torch.arange(C), labels=labels):
        thief = told({'answers': how, 'seed': seed}, labels, C)
        thief.observe(None, None, rows)
        z = student[rows][:, names].clone().requires_grad_()
        value = thief(z, teacher[rows][:, names], names.argsort()[labels[rows]])
        value.backward()
        assert value.isfinite() and z.grad.isfinite().all() and value >= -1e-10
        return z.grad[rows.argsort()][:, names.argsort()], ~thief.known[:B]

    generator = torch.Generator().manual_seed(seed)
    grad, missing = pushed()
    if how == 'none': assert (grad[missing] == 0).all()
    else: assert (grad[missing].abs().sum(1) > 0).all()
    assert torch.equal(grad, pushed(labels=torch.where(missing, (labels + 1) % C, labels))[0])
    torch.testing.assert_close(grad, pushed(rows=torch.randperm(B, generator=generator))[0], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(grad, pushed(names=torch.randperm(C, generator=generator))[0], rtol=1e-9, atol=1e-12)


def test_extra_with_half_precision_and_without_a_gradient_for_the_box():
    student, teacher, _, labels = case(8, 10, 3.)
    teacher = teacher.float().requires_grad_()
    values = []
    for z in (student.bfloat16(), student.bfloat16().float()):
        z.requires_grad_()
        with torch.autocast('cpu', torch.bfloat16): values.append(told({}, labels, 10)(z, teacher, labels))
        values[-1].backward()
    assert values[0].dtype == torch.float32 and torch.equal(*values) and teacher.grad is None


def test_a_batch_that_was_not_named_is_refused():
    student, teacher, _, labels = case(8, 10, 3.)
    thief = attack('extra', train_labels=labels)
    for names in (None, torch.arange(7)):
        thief.indices = names
        with pytest.raises(Invalid, match='extra does not know which images these are; call observe'): thief(student, teacher, labels)
    thief.observe(None, labels, torch.arange(8))
    thief(student, teacher, labels)
    with pytest.raises(Invalid, match='call observe'): thief(student, teacher, labels)


@pytest.mark.parametrize('name, options, message', [
    ('mixup', {'mixing': 0}, 'mixing is 0; it must be a number above 0'), ('mixup', {'mixing': math.inf}, 'mixing is inf'), ('mixup', {'mixing': '1'}, "mixing is '1'"),
    ('mixup', {'weight': 1.5}, 'weight is 1.5'), ('mixup', {'temperature': 0}, 'temperature is 0'), ('extra', {'labelled': 0}, 'labelled is 0'),
    ('extra', {'labelled': 1.1}, 'labelled is 1.1; it must be a number above 0 up to 1'),
    ('extra', {'answers': 'top2'}, "Unknown answers 'top2'; accepted: probabilities, top1, none"),
    ('extra', {'weight': -1}, 'weight is -1'), ('extra', {'train_labels': None}, 'extra needs train_labels')])
def test_options_out_of_range_are_one_clear_sentence(name, options, message):
    facts = {'train_labels': torch.arange(8)} if name == 'extra' else {}
    with pytest.raises(Invalid, match=message): attack(name, **{**facts, **options})


@pytest.mark.parametrize('targets, message', [(torch.ones(4, 5), r'mixed labels have shape \(4, 5\)'), (torch.ones(4, 6, dtype=torch.long), 'they must be probabilities'),
                                              (torch.ones(4, 6), 'the logarithms of mixed labels: 4 of 4 rows'), (torch.tensor([0, 1, 6, 2]), 'labels run from 0 to 6')])
def test_mixed_labels_are_checked(targets, message):
    z = torch.randn(4, 6)
    with pytest.raises(Invalid, match=message): attack('mixup')(z, z.log_softmax(1), targets)
    with pytest.raises(Invalid, match='labels have shape|labels run'): attack('kd')(z, z.log_softmax(1), targets)
