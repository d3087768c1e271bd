"Recipes and weights chosen by name, and changes of single numbers: what they make of the paper's plan."
import functools
import subprocess
import sys

import pytest
import torch
import torchvision

from cmim_repro.core import Invalid
from cmim_repro.exhibits.table1 import entries as table1_entries
from cmim_repro.experiments.profiles import narrowed, profile
from cmim_repro.experiments.runs import Plan
from cmim_repro.lab.models import imagenet
from cmim_repro.lab.models.core import model
from cmim_repro.lab.training import Recipe


@functools.cache
def runs(overrides='', **narrowing):
    "(defence, column, student, choice) to the run of seed 0."
    chosen = narrowed(profile('paper'), seeds=1, overrides=overrides, **narrowing)
    return {(e.data, e.defense, e.teacher_model, e.column, e.student_model, e.choice): e.run
            for e in table1_entries(chosen)}


def test_the_whole_plan_under_the_papers_recipe():
    authors, paper = runs('recipe=authors'), runs('recipe=paper')
    assert authors == runs() and authors.keys() == paper.keys()
    for key, run in paper.items():
        if run.data == 'imagenet' or run.kind == 'release' and run.method != 'apgp': continue
        own = run.method in ('knockoff', 'apgp')
        assert run.recipe.gamma == .1 and (own or run.recipe.lr == .1 and run.recipe.epochs == 200), key
    assert all(paper[key] == authors[key] for key in paper if key[0] == 'imagenet')
    slow = {run.model for run in authors.values() if run.recipe.lr == .01 and run.method != 'knockoff'}
    assert slow == {'shufflenetv2'}


def test_a_smaller_plan_keeps_the_shape_of_every_recipe():
    for key, run in runs('epochs=20').items():
        r = run.recipe
        if run.kind == 'release': continue
        assert r.epochs == 20, key
        if r.schedule == 'multistep': assert r.milestones == (6, 12, 16)
        elif run.method == 'knockoff': assert r.step_epochs == 12
        elif run.model == 'imagenet_mobilenetv2': assert r.step_epochs == 1
        else: assert r.step_epochs == round(30 * 20 / 90)


@pytest.mark.parametrize('text, field, value, whom', [
    ('precision=bf16', 'precision', 'bf16', lambda run: True), ('nesterov=True', 'nesterov', True, lambda run: True),
    ('warmup_epochs=5', 'warmup_epochs', 5, lambda run: True),
    ('resnet18.weight_decay=0.001', 'weight_decay', .001, lambda run: run.model == 'resnet18'
     and run.method != 'knockoff'),
    ('knockoff.batch_size=32', 'batch_size', 32, lambda run: run.method == 'knockoff'),
                                                      ('cmim.lr=0.03', 'lr', .03, lambda run: run.method == 'cmim')])
def test_one_number_of_a_recipe(text, field, value, whom):
    before, after = (runs(changes, data_sets='cifar100', defenses='cmim', attacks='kd, knockoff')
                     for changes in ('', text))
    for key in before:
        expected = {**vars(before[key].recipe), **({field: value} if whom(before[key]) else {})}
        assert vars(after[key].recipe) == expected, key


def test_one_option_of_a_method():
    before, after = (runs(text, data_sets='cifar100', defenses='cmim', networks='vgg16:vgg11')
                     for text in ('', 'kd.temperature=1'))
    assert {key[3] for key in before if before[key] != after[key]} == {'kd'}
    assert after['cifar100', 'cmim', 'vgg16', 'kd', 'vgg11', ''].options['temperature'] == 1


def test_published_weights_make_another_teacher_and_nothing_else(monkeypatch, tmp_path):
    trained, taken = (runs(text, data_sets='imagenet', defenses='st, nt, mad, apgp, cmim, ls', attacks='kd, dkd')
                      for text in ('', 'pretrained=True'))
    touched = {key[1] for key in taken if taken[key] != trained[key]}
    assert touched == {'ce', 'st', 'nt', 'mad', 'apgp'}
    assert all(taken[key] == trained[key] for key in taken if key[1] in ('cmim', 'ls') or key[3] == 'ls')
    plan = Plan.of(taken.values()).check()
    loaded = [run for run in plan.runs if run.model_options['pretrained'] and run.kind == 'training']
    assert [(run.method, run.model, run.recipe, run.seed)
            for run in loaded] == [('ce', 'imagenet_resnet34', Recipe(), 0)]
    saved = torchvision.models.resnet34(num_classes=1000).state_dict()
    asked = []
    torch.save(saved, tmp_path/'resnet34.pth')
    monkeypatch.setattr(imagenet, '_published', lambda url: asked.append(url) or tmp_path/'resnet34.pth')
    net = model(loaded[0].model, **loaded[0].model_options, num_classes=1000, image_shape=(3, 224, 224))
    assert asked == [torchvision.models.ResNet34_Weights.IMAGENET1K_V1.url]
    assert all(torch.equal(value, saved[name]) for name, value in net.state_dict().items())
    students = {run.model for run in plan.runs if run.kind == 'attack'}
    assert students == {'imagenet_resnet18', 'imagenet_mobilenetv2'}
    assert not any(run.model_options['pretrained'] for run in plan.runs if run.kind == 'attack'
                   or run.method in ('cmim', 'nt', 'ls'))


def test_published_weights_follow_the_data_set():
    cifar = runs('pretrained=True', data_sets='cifar100, imagenet', defenses='st', attacks='kd')
    assert {key[0] for key, run in cifar.items() if run.model_options.get('pretrained')} == {'imagenet'}
    assert runs('pretrained=False', data_sets='imagenet') == runs(data_sets='imagenet')


@pytest.mark.parametrize('overrides, narrowing, words', [
    ('pretrained=True', {'data_sets': 'cifar100, tinyimagenet'},
     'pretrained is True; published weights exist for the data set imagenet, and this is about cifar100, tinyimagenet'),
    ('pretrained=True, classes=10', {'data_sets': 'imagenet'}, 'pretrained is True and classes is 10'),
    ('pretrained=yes', {'data_sets': 'imagenet'}, "pretrained is 'yes'; it must be True or False"),
    ('pretrained=True', {'data_sets': 'imagenet', 'networks': 'resnet18:resnet18'}, "Unknown option of network "
                                                                                    "'resnet18' 'pretrained'"),
    ('recipe=best', {}, "Unknown recipe for cifar100 'best'; accepted: authors, paper"),
    ('recipe=imagenet', {}, "Unknown recipe for cifar100 'imagenet'"),
    ('recipe=paper paper', {}, 'Unknown recipe for cifar100'),
    ('milestones=soon', {}, "milestones is 'soon'"), ('precision=fp8', {}, 'fp8'),
                                                         ('vgg16.temperature=3', {}, "Unknown recipe option "
                                                                                     "'temperature'"),
    ('kd.lr=slow', {}, "lr is 'slow'"), ('kd.temprature=3', {}, "Unknown option of attack 'kd' 'temprature'"),
    ('image_size=64', {'data_sets': 'cifar100'}, 'image_size is 64; the images of cifar100 have a fixed size')])
def test_what_cannot_be_chosen_is_one_sentence(overrides, narrowing, words):
    with pytest.raises(Invalid) as refusal: runs(overrides, defenses='st', attacks='kd', **narrowing)
    assert words in str(refusal.value) and '\n' not in str(refusal.value)


@pytest.mark.parametrize('nesterov', [False, True])
def test_the_optimiser_is_sgd_bit_for_bit_and_loads_no_compiler(nesterov):
    code = f'''
import sys
import torch
from cmim_repro.lab.training import Recipe, sgd
recipe, nets = Recipe(nesterov={nesterov}), [torch.nn.Linear(3, 2, bias=False) for _ in range(2)]
nets[1].load_state_dict(nets[0].state_dict())
def steps(net, optimizer):
    for x in torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(1)):
        optimizer.zero_grad()
        net(x).square().sum().backward()
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
steps(nets[0], sgd(nets[0], recipe, torch.device('cpu'))[0])
print(not any(name.startswith('torch._dynamo') for name in sys.modules))
steps(nets[1], torch.optim.SGD(nets[1].parameters(), .1, .9, weight_decay=5e-4, nesterov={nesterov}))
print(torch.equal(nets[0].weight, nets[1].weight))'''
    said = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert said.stdout.split() == ['True', 'True']
