"""What theory says of every attack, on inputs that hypothesis chooses."""
import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cmim_repro.attacks.core import attack
from cmim_repro.core import Invalid
from cmim_repro.defenses.core import release

BEYOND = ['amplified', 'anchored', 'extra', 'mixup', 'recovery', 'scm', 'standardised', 'ttm', 'unmixed', 'wttm'] # Table 1, so without settings of the paper
NAMES = sorted(['avg', 'dist', 'dkd', 'htc', 'kd', 'knockoff', 'mkd', *BEYOND])
TOLD = ['extra'] # has to know which images it sees; see tests/test_more_attackers.py
VARIANTS = [(name, variant) for name in NAMES if name not in TOLD for variant in attack.variants(name)]
METHODS = pytest.mark.parametrize('name,variant', VARIANTS)
ZEROS = ['none', 'tail', 'label', 'all_but_label', 'one_other', 'column']


def make(name, variant, C, dtype=torch.float64):
    return attack(name, variant, **({'num_classes': C} if 'num_classes' in attack.context(name) else {})).to(dtype)


def zeroed(log_probs, labels, kind):
    "Answers with exact zeros where a defence may put them."
    B, C = log_probs.shape
    label = torch.nn.functional.one_hot(labels, C).bool()
    keep = {'none': torch.ones(B, C, dtype=torch.bool), 'tail': log_probs >= log_probs.median(1, keepdim=True).values, 'label': ~label,
            'all_but_label': label, 'one_other': torch.nn.functional.one_hot((labels + 1) % C, C).bool(), 'column': torch.arange(C).expand(B, C) > 0}[kind]
    return log_probs.masked_fill(~keep, -torch.inf).log_softmax(1)


@st.composite
def batches(draw, kinds=tuple(ZEROS), dtypes=(torch.float32, torch.float64)):
    B, C = draw(st.integers(1, 6)), draw(st.integers(2, 12))
    dtype, scale = draw(st.sampled_from(dtypes)), draw(st.sampled_from([0., 1., 10., 50.]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    student, teacher = (2*torch.rand(2, B, C, generator=generator, dtype=dtype) - 1) * scale
    labels = torch.randint(C, (B,), generator=generator)
    return student, zeroed(teacher.log_softmax(1), labels, draw(st.sampled_from(kinds))), labels


@METHODS
@given(batch=batches(), epoch=st.sampled_from([0, 19, 300]))
@settings(max_examples=40, deadline=None)
def test_finite_and_not_negative(name, variant, batch, epoch):
    student, teacher, labels = batch
    student = student.clone().requires_grad_()
    module = make(name, variant, student.shape[1], student.dtype)
    value = module(student, teacher, labels, epoch)
    value.backward()
    assert value.ndim == 0 and value.isfinite() and student.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in module.parameters())
    assert value >= (-1e-4 if student.dtype == torch.float32 else -1e-10)


RELEASES = [('identity', {}), ('st', {}), ('st', {'ratio': .5}), ('rsp', {'variant': 'paper'}), ('rsp', {'variant': 'authors'}), ('mad', {'budget': 2.}),
            ('mad', {'budget': 2., 'oracle': 'extreme'}), ('apgp', {})]


@METHODS
@pytest.mark.parametrize('B,C', [(1, 2), (1, 10), (1, 12), (5, 2), (5, 12)])
def test_every_attack_on_every_release(name, variant, B, C):
    "What a defence really lets out, exact zeros included, mild and extreme: the loss and all gradients are finite."
    generator = torch.Generator().manual_seed(B*C)
    facts = {'mad': {'num_classes': C, 'image_shape': (1, 8, 8), 'surrogate': 'cnn_tiny'}, 'apgp': {'num_classes': C, 'hidden': 8}}
    for scale, (defence, options) in itertools.product((1., 50.), RELEASES):
        victim, student = (2*torch.rand(2, B, C, generator=generator) - 1) * scale
        module, student = make(name, variant, C, torch.float32), student.requires_grad_()
        with torch.no_grad(): answers = release(defence, **options, **facts.get(defence, {}))(victim.log_softmax(1), torch.rand(B, 1, 8, 8, generator=generator))
        if defence == 'st': assert (answers == -torch.inf).any()
        value = module(student, answers, torch.randint(C, (B,), generator=generator), 3)
        value.backward()
        assert value.isfinite() and student.grad.isfinite().all() and all(p.grad.isfinite().all() for p in module.parameters()), (defence, options, scale)


@METHODS
@given(batch=batches(dtypes=(torch.float64,)), key=st.integers(0, 2**31))
@settings(max_examples=25, deadline=None)
def test_renaming_the_classes_changes_nothing(name, variant, batch, key):
    student, teacher, labels = batch
    C = student.shape[1]
    order = torch.randperm(C, generator=torch.Generator().manual_seed(key))
    plain = make(name, variant, C)
    renamed = copy.deepcopy(plain)
    if name == 'mkd':
        with torch.no_grad():
            renamed.transform.factors.copy_(plain.transform.factors[order][:, :, order])
            renamed.transform.scale.copy_(plain.transform.scale[order])
    expected, got = plain(student, teacher, labels, 3), renamed(student[:, order], teacher[:, order], order.argsort()[labels], 3)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@METHODS
@given(batch=batches(dtypes=(torch.float64,)), key=st.integers(0, 2**31))
@settings(max_examples=25, deadline=None)
def test_order_of_the_samples_does_not_matter(name, variant, batch, key):
    student, teacher, labels = batch
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(key))
    module = make(name, variant, student.shape[1])
    torch.testing.assert_close(module(student[order], teacher[order], labels[order], 3), module(student, teacher, labels, 3), rtol=1e-9, atol=1e-9)


@METHODS
@given(batch=batches(kinds=('none',), dtypes=(torch.float64,)), shift=st.floats(-20, 20))
@settings(max_examples=25, deadline=None)
def test_a_constant_added_to_logits_is_not_seen(name, variant, batch, shift):
    student, teacher, labels = batch
    module = make(name, variant, student.shape[1])
    torch.testing.assert_close(module(student + shift, teacher, labels, 3), module(student, teacher, labels, 3), rtol=1e-8, atol=1e-8)


SOFT_ONLY = [('kd', {'weight': 1.}), ('anchored', {'weight': 1.}), ('scm', {'weight': 1.}), ('mixup', {'weight': 1.}), ('htc', {'ce_weight': 0.}), ('dkd', {'ce_weight': 0.}),
             ('knockoff', {})]


@pytest.mark.parametrize('name,options', SOFT_ONLY)
@given(batch=batches(kinds=('none',), dtypes=(torch.float64,)))
@settings(max_examples=40, deadline=None)
def test_a_student_that_is_the_teacher_feels_nothing(name, options, batch):
    _, teacher, labels = batch
    student = teacher.clone().requires_grad_()
    attack(name, **options)(student, teacher, labels, 3).backward()
    assert student.grad.abs().max() < 1e-10


def remainder(probs, share):
    "1 - correlation, averaged over the rows, of a row with (1 - share) times itself plus a constant, in exact arithmetic."
    squares = (probs - probs.mean(1, keepdim=True)).square().sum(1)
    return (1e-8 / ((1 - share)*squares + 1e-8)).mean() # DIST adds 1e-8 to the product of the norms


@given(B=st.integers(1, 40), C=st.integers(2, 12), scale=st.floats(0, 50), seed=st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_dist_asks_for_a_linear_relation_only(B, C, scale, seed):
    """A student that is a rising linear function of the teacher loses what the 1e-8 leaves, and nothing else.

    Rounding: a student's probability is wrong by less than d = 1e-13 of the largest, 1. With n the norm of the teacher's
    centred row (or column) and a = 1 - share, a correlation is then wrong by less than n d sqrt(40)/(a n^2 + 1e-8), which
    is largest at a n^2 = 1e-8: d sqrt(40)/(2 sqrt(a 1e-8)) < 1e-8."""
    generator = torch.Generator().manual_seed(seed)
    teacher = (scale * torch.randn(B, C, generator=generator, dtype=torch.float64)).log_softmax(1)
    dist, probs = attack('dist', 'paper'), teacher.exp()
    for share in (0., .3, .8):
        inter, intra = dist.relations(((1 - share)*probs + share/C).log(), teacher)
        torch.testing.assert_close(inter, remainder(probs, share), rtol=0, atol=1e-8)
        torch.testing.assert_close(intra, remainder(probs.T, share), rtol=0, atol=1e-8)
    assert dist.relations(-teacher, teacher)[0] > 1 - 1e-8 # the opposite order has no positive correlation (Chebyshev)


@given(batch=batches(kinds=('none', 'tail'), dtypes=(torch.float64,)), T=st.floats(.5, 30))
@settings(max_examples=40, deadline=None)
def test_only_a_student_that_agrees_has_no_soft_loss(batch, T):
    student, teacher, labels = batch
    divergence = attack('kd', weight=1., temperature=T)(student, teacher, labels)
    distance = ((student/T).softmax(1) - (teacher/T).softmax(1)).abs().sum(1)
    assert divergence / T**2 >= (distance**2).mean()/2 - 1e-12  # Pinsker's inequality


@METHODS
@pytest.mark.parametrize('half', [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(name, variant, half):
    student, teacher, labels = torch.randn(4, 6).to(half), torch.randn(4, 6).log_softmax(1), torch.tensor([0, 1, 1, 5])
    module = make(name, variant, 6, torch.float32)
    with torch.autocast('cpu', torch.bfloat16): value = module(student, teacher, labels, 3)
    assert value.dtype == torch.float32
    assert torch.equal(value, module(student.float(), teacher, labels, 3))


@METHODS
def test_the_teacher_gets_no_gradient(name, variant):
    teacher = torch.randn(4, 6).log_softmax(1).requires_grad_()
    student = torch.randn(4, 6, requires_grad=True)
    make(name, variant, 6, torch.float32)(student, teacher, torch.tensor([0, 1, 1, 5]), 3).backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0


@METHODS
def test_shapes_are_checked(name, variant):
    module, z, labels = make(name, variant, 6), torch.zeros(4, 6), torch.tensor([0, 1, 1, 5])
    with pytest.raises(Invalid, match='no teacher_log_probs'): module(z, None, labels, 3)
    with pytest.raises(Invalid, match=r'teacher_log_probs have shape \(4, 5\)'): module(z, z[:, :5], labels, 3)
    with pytest.raises(Invalid, match=r'labels have shape \(3,\)'): module(z, z, labels[:3])
    with pytest.raises(Invalid, match=r'logits have shape \(6,\)'): module(z[0], z[0], labels, 3)


def test_all_attacks_of_table_1_and_their_variants():
    assert attack.names() == NAMES
    for name in set(NAMES) - set(BEYOND): assert {'recommended', 'authors', 'paper'} <= set(attack.variants(name))


def test_the_memory_of_mkd_is_bounded_by_pieces():
    C, B = 120, 30
    mkd = attack('mkd', num_classes=C)
    from cmim_repro.attacks.mkd import markov_output
    probs, labels = torch.randn(B, C).softmax(1), torch.arange(B)
    values = [markov_output(probs, labels, mkd.transform.scale, mkd.transform.factors, entries=entries) for entries in (2**24, 4*C*C)]
    torch.testing.assert_close(values[0], values[1])
    gradients = [torch.autograd.grad((value**2).sum(), [mkd.transform.scale, mkd.transform.factors]) for value in values]
    for whole, cut in zip(*gradients, strict=True): torch.testing.assert_close(whole, cut)
