"""Every attack against vectors made by the reference codes: values and gradients, float64 and float32."""
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cmim_repro.attacks.core import attack, soft_kl
from cmim_repro.attacks.mkd import markov_output
from cmim_repro.theory.distributions import power_transform

GOLDEN = Path(__file__).parent / 'golden'
CASES = ['b8c100', 'b4c10', 'b1c5', 'b3c2', 'b6c100ext', 'b12c20rep']
DTYPES = [torch.float64, torch.float32]

KD = {f'{key}_T{T}': ('kd', 'recommended' if key != 'cmimrepo_total_a0.9' else 'authors', {'weight': weight, 'temperature': T})
      for T in (1, 4, 20) for key, weight in [('klT2', 1.), ('total_a0.9', .9), ('cmimrepo_total_a0.9', .9)]}
DKD = {f'a{a}b{b}T{T}': ('dkd', 'authors', {'target_weight': a, 'nontarget_weight': b, 'temperature': T})
       for a, b, T in [(1, 4, 1), (1, 4, 4), (1, 8, 4), (2, 8, 1), (2, 8, 4)]}
DIST = {f'b{b}g{g}tau{tau}': ('dist', 'recommended', {'inter_weight': b, 'intra_weight': g, 'temperature': tau, 'weight': 1., 'ce_weight': 0.})
        for b, g, tau in [(1, 1, 1), (1, 1, 4), (2, .5, 1)]}
DIST |= {'teacherprob_tau1': DIST['b1g1tau1'], 'cmimrepo_total': ('dist', 'authors', {})}
HTC = {'cmimrepo_T20_l0p01': ('htc', 'authors', {})}
HTC |= {f'thirdparty_a{a}_T{T}': ('htc', 'thirdparty', {'weight': a, 'ce_weight': 1 - a, 'temperature': T}) for a, T in [(.01, 20), (.9, 20), (.9, 50)]}
AVG = {'cmimrepo_a0p9_T4': ('avg', 'authors', {})} | {f'official_a0.9_T{T}': ('avg', 'official', {'temperature': T}) for T in (4, 20)}
KNOCKOFF = {'soft_ce': ('knockoff', 'recommended', {}), 'cmimrepo': ('knockoff', 'authors', {})}
LOSSES = [(file, key, *entry) for file, entries in
          dict(kd=KD, dkd=DKD, dist=DIST, htc=HTC, avg=AVG, knockoff=KNOCKOFF).items() for key, entry in entries.items()]


@pytest.fixture(scope='module')
def golden():
    files = {}

    def read(file, case):
        if file not in files: files[file] = np.load(GOLDEN / f'{file}.npz', allow_pickle=False)
        prefix = case + '__'
        return {name.removeprefix(prefix): torch.from_numpy(files[file][name]) for name in files[file].files if name.startswith(prefix)}
    return read


def agree(ours, theirs, dtype):
    rtol, atol = (1e-8, 1e-12) if dtype == torch.float64 else (1e-4, 2e-6)
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=rtol, atol=atol)


def inputs(vectors, dtype):
    return vectors['student_logits'].to(dtype).requires_grad_(), vectors['teacher_logits'].log_softmax(1).to(dtype), vectors['labels']


def usable(case, dtype):
    if dtype == torch.float32 and case.endswith('ext'): pytest.skip('logits of 50 are beyond what float32 is held to')


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('case', CASES)
@pytest.mark.parametrize('file,key,name,variant,options', LOSSES, ids=[f'{f}-{k}' for f, k, *_ in LOSSES])
def test_loss_and_gradient(golden, file, key, name, variant, options, case, dtype):
    usable(case, dtype)
    vectors = golden(file, case)
    student, teacher, labels = inputs(vectors, dtype)
    value = attack(name, variant, **options)(student, teacher, labels)
    value.backward()
    agree(value, vectors[key], dtype)
    agree(student.grad, vectors[key + '_grad'], dtype)


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('case', CASES)
@pytest.mark.parametrize('ratio', ['0.1', '0.4', '0.5'])
def test_kd_on_a_stingy_teacher(golden, case, ratio, dtype):
    usable(case, dtype)
    vectors = golden('st', case)
    if f'ratio{ratio}_sparse_probs' not in vectors: pytest.skip('the reference was not asked, or keeps no class')
    student, _, labels = inputs(vectors, dtype)
    sparse = vectors[f'ratio{ratio}_sparse_probs'].to(dtype).log()
    for key, variant, T in [*((f'ratio{ratio}_a0.9_T{T}', 'recommended', T) for T in (1, 4, 20)), (f'cmimrepo_ratio{ratio}_T4', 'authors', 4)]:
        value = attack('kd', variant, temperature=T)(student, sparse, labels)
        agree(value, vectors[key], dtype)
        agree(torch.autograd.grad(value, student)[0], vectors[key + '_grad'], dtype)


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('case', CASES)
@pytest.mark.parametrize('dimension,T', [(3, 4), (5, 4), (16, 1)])
def test_mkd_of_the_authors(golden, case, dimension, T, dtype):
    usable(case, dtype)
    vectors, key = golden('mkd', case), f'd{dimension}T{T}_'
    if key + 'W' not in vectors: pytest.skip('the file has no such case')
    student, teacher, labels = inputs(vectors, dtype)
    mkd = attack('mkd', 'authors', dimension=dimension, temperature=T, num_classes=student.shape[1]).to(dtype)
    with torch.no_grad():
        mkd.transform.factors.copy_(vectors[key + 'W'])
        mkd.transform.scale.copy_(vectors[key + 'Iscale'])
    for entries in (2**24, student.shape[1]**2):
        output = markov_output(power_transform(teacher, temperature=T).exp(), labels, mkd.transform.scale, mkd.transform.factors, 'repo', entries)
        agree(output, vectors[key + 'markov_out'], dtype)
        agree(output, vectors[key + 'markov_out_from_probs'], dtype)
    value = mkd(student, teacher, labels)
    value.backward()
    agree(value, vectors[key + 'student_loss'], dtype)
    agree(student.grad, vectors[key + 'student_grad'], dtype)
    agree(mkd.transform.factors.grad, vectors[key + 'transform_grad_W'], dtype)
    agree(mkd.transform.scale.grad, vectors[key + 'transform_grad_Iscale'], dtype)
    agree(.9 * T**2 * soft_kl(mkd.transform(teacher, labels), power_transform(student, temperature=T)), vectors[key + 'transform_loss'], dtype)


def test_published_losses_are_the_parts_they_are_made_of(golden):
    vectors = golden('dkd', 'b12c20rep')
    student, teacher, labels = inputs(vectors, torch.float64)
    hard = F.cross_entropy(student, labels)
    agree(attack('dkd')(student, teacher, labels, 20), hard + vectors['a1b8T4'], torch.float64)
    agree(attack('dkd')(student, teacher, labels, 4), hard + .25*vectors['a1b8T4'], torch.float64)
    agree(attack('dist')(student, teacher, labels), hard + 2*golden('dist', 'b12c20rep')['b1g1tau4'], torch.float64)


def test_every_vector_of_the_files_is_used(golden):
    used = {(file, key) for file, key, *_ in LOSSES}
    for file in ('kd', 'dkd', 'dist', 'htc', 'avg', 'knockoff'):
        for case in CASES:
            left = {key.removesuffix('_grad') for key in golden(file, case)} - {'student_logits', 'teacher_logits', 'labels'}
            assert {(file, key) for key in left} <= used
    parts = {'W', 'Iscale', 'markov_out', 'markov_out_from_probs', 'student_loss', 'student_grad', 'transform_loss', 'transform_grad_W', 'transform_grad_Iscale'}
    for case in CASES:
        left = set(golden('mkd', case)) - {'student_logits', 'teacher_logits', 'labels'}
        assert left <= {f'{kind}_{part}' for kind in ('d3T4', 'd5T4', 'd16T1') for part in parts}
