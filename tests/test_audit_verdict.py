"""The audit of a network: what may be a teacher, its identity, when a verdict is made, that it goes on, and bad input."""
import json
import math
import sys
import time

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision
from PIL import Image

from cmim_repro.__main__ import main
from cmim_repro.audits.own_teacher import audit_task, network_options, own_teacher, try_out
from cmim_repro.audits.verdict import LOOKS, audit_model, confidence_at, judged, seed_entries, spread
from cmim_repro.core import Invalid, Unusable
from cmim_repro.experiments.store import Store
from cmim_repro.lab.data.core import dataset
from cmim_repro.report.paper import TUNED_END

MINE = '''
from pathlib import Path
import torch
from torch import nn

class Net(nn.Sequential):
    def __init__(self, num_classes=10): super().__init__(nn.Flatten(), nn.Linear(3*16*16, num_classes))

def answer(images): return -images.mean(1).flatten(1)[:, :10]*float(Path('factor.txt').read_text())
def odds(images): return answer(images).softmax(1)
def few(images): return answer(images)[:, :9]
def broken(images): raise KeyError('nothing here')
number = 3
'''
SMALL = {'attacks': 'kd', 'tries': 2, 'workers': 1, 'draws': 20, 'overrides': 'epochs=1'}
WORDS = ['--attacks', 'kd', '--tries', '2', '--workers', '1', '--draws', '20', '--overrides', 'epochs=1', '--budget', '1s']


@pytest.fixture(scope='module')
def tree(tmp_path_factory):
    "Ten classes of scikit-learn's digits as images of 16 pixels, in train and val."
    root, data = tmp_path_factory.mktemp('digits'), dataset('digits')
    for split, folder in {'train': 'train', 'test': 'val'}.items():
        pictures = data.pictures(data.take(split, range(data.size(split))))
        for y in range(10):
            (root/folder/str(y)).mkdir(parents=True)
            for i, picture in enumerate(pictures[data.labels(split) == y][:12]):
                grey = (picture[0]*255).round().byte().numpy()
                Image.fromarray(grey).resize((16, 16)).convert('RGB').save(root/folder/str(y)/f'{i}.png')
    return root


@pytest.fixture
def home(tmp_path, monkeypatch):
    "A working directory with a module of the reader's."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'path', [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, 'mine', raising=False)
    (tmp_path/'mine.py').write_text(MINE)
    (tmp_path/'factor.txt').write_text('5')
    return tmp_path


def net(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3*16*16, 10)).eval()


def a_function(home): return {'model': 'mine:answer'}
def random_resnet18(home): return {'model': 'torchvision:resnet18'}


def weights_of_a_class(home):
    safetensors.torch.save_file(net().state_dict(), home/'net.safetensors')
    return {'model': 'mine:Net', 'weights': 'net.safetensors'}


def a_saved_state_dict(home):
    torch.save({'state_dict': torchvision.models.squeezenet1_1(num_classes=10).state_dict()}, home/'net.tar')
    return {'model': 'torchvision:squeezenet1_1', 'weights': 'net.tar'}


def torchscript(home):
    torch.jit.trace(net(), torch.zeros(1, 3, 16, 16)).save(home/'net.pt')
    return {'model': 'net.pt'}


def onnx(home):
    pytest.importorskip('onnxruntime')
    torch.onnx.export(net(), (torch.zeros(5, 3, 16, 16),), home/'net.onnx', dynamo=False)
    return {'model': 'net.onnx'}


def of_timm(home):
    pytest.importorskip('timm')
    return {'model': 'timm:resnet10t'}


@pytest.mark.parametrize('make', [a_function, random_resnet18, weights_of_a_class, a_saved_state_dict, torchscript, onnx, of_timm])
def test_whatever_answers_can_be_audited(make, home, tree):
    given = make(home)
    large = {'image_size': 32} if make in (a_saved_state_dict, of_timm) else {}
    found = audit_model(**given, data=str(tree), budget='1s', store=home/'store', **SMALL, **large)
    assert found.verdict == 'undecided' and found.students.facts['query budget'] == 90 and found.students.facts['data budget'] == 120
    assert set(found.parts) == {'others', 'train'} and found.summary['images'] == 120
    options = network_options(given['model'], given.get('weights'))
    assert found.students.facts['sha256'] == options.get('sha256', '')
    teacher = own_teacher(audit_task(str(tree), options, attacks='kd', overrides='epochs=1', **large))
    answers = try_out(teacher)
    torch.testing.assert_close(Store(home/'store').log_probs(teacher)[0][:64].exp(), answers.exp(), atol=1e-4, rtol=0)
    if make in (weights_of_a_class, torchscript, onnx):
        images = dataset('folder', **teacher.data_options).take('test', range(64))
        with torch.no_grad(): torch.testing.assert_close(answers, net()(images).log_softmax(1), atol=1e-4, rtol=0)


def test_a_network_is_known_by_its_weights_and_not_by_their_place(home, tree):
    def teacher(path, seed):
        safetensors.torch.save_file(net(seed).state_dict(), path)
        return own_teacher(audit_task(str(tree), network_options('mine:Net', path)))
    (home/'elsewhere').mkdir()
    one, moved, other = teacher('net.safetensors', 0), teacher('elsewhere/x.safetensors', 0), teacher('net.safetensors', 1)
    assert one.id == moved.id != other.id and str(home) not in json.dumps(dict(one.model_options))


def test_what_is_finished_is_not_trained_again_and_the_file_is_needed_no_more(home, tree):
    given, store = torchscript(home), Store(home/'store')
    asked = {'data': str(tree), 'store': store.root, **given, **SMALL}
    first = audit_model(**asked, budget='0.001s')
    assert first.students.facts['seeds'] == 0 and 'No seed was finished' in first.reason
    begun = {path: path.stat().st_mtime_ns for path in store.root.glob('*/result.json')}
    assert len(begun) == 4 # the network and its null arms
    found = audit_model(**asked, budget='6s')
    done = {path: path.stat().st_mtime_ns for path in store.root.glob('*/result.json')}
    assert done.items() >= begun.items() and found.students.facts['seeds'] >= 1
    again = audit_model(**asked, budget='0.001s')
    assert again.students.facts['seeds'] == found.students.facts['seeds'] and again.reason == found.reason


def test_a_function_that_answers_otherwise_is_refused(home, tree):
    audit_model('mine:answer', str(tree), budget='0.001s', store=home/'store', **SMALL)
    (home/'factor.txt').write_text('1')
    with pytest.raises(Unusable, match='mine:answer no longer answers as in'):
        audit_model('mine:answer', str(tree), budget='1s', store=home/'store', **SMALL)


def test_students_have_a_part_of_the_images(home, tree):
    found = audit_model('mine:answer', str(tree), budget='1s', store=home/'store', thief_images='50%', **SMALL)
    facts = found.students.facts
    assert (facts['data budget'], facts['images of the owner'], facts['thief_images']) == (60, 120, .5)


class Kept:
    "A store in which accuracies follow from a rule."
    def __init__(self, rule): self.rule = rule
    def diverged(self, run): return None
    def key(self, run): return int(run.id[:6], 16)

    def result(self, run):
        arm = run.teacher.method if run.teacher else ''
        noise = float(np.random.default_rng([run.seed, self.key(run)]).normal(0, .002))
        value = self.rule(run.method, arm) + noise
        return {'accuracy': value, 'best_accuracy': value, 'held_out_accuracy': value, 'seconds': 1.}


class Blind(Kept):
    "Students that do not depend on what they are told, and an LS student that looks best where candidates are chosen."
    def key(self, run): return sum(map(ord, run.method + str(run.options)))
    def result(self, run): return {**super().result(run), 'held_out_accuracy': .9 if run.method == 'ls' else .8}


def say(rule, seeds, margin=.5, kept=Kept):
    task = audit_task('digits', {'source': 'torchvision:resnet18'}, attacks='kd, dkd')
    entries = [e for seed in range(seeds) for e in seed_entries(task, own_teacher(task), seed, 3)]
    return judged(entries, kept(rule), task.null_arms, margin)


def test_a_gain_over_label_smoothing_and_all_null_arms_is_distillable():
    _, verdict, reason, left = say(lambda method, arm: .8 if (method, arm) == ('kd', 'own') else .7, 4)
    assert verdict == 'distillable' and reason.startswith('KD') and left == 0


def test_a_gain_that_a_null_arm_has_too_is_none():
    _, verdict, _, _ = say(lambda method, arm: .8 if method == 'kd' and arm in ('own', 'centroid') else .7, 4)
    assert verdict != 'distillable'


def test_a_student_that_is_the_same_without_the_network_gains_nothing():
    "As of a network that answers its top-1 alone: its centroids are its answers."
    table, verdict, _, _ = say(lambda method, arm: .7 if method == 'ls' else .8, 4, kept=Blind)
    assert verdict == 'undecided' and (table['mean'] == 0).all()


def test_no_gain_is_undistillable_within_the_margin():
    rule = lambda method, arm: .7
    assert say(rule, 4, margin=3)[1] == 'undistillable'
    _, verdict, _, left = say(rule, 4, margin=.01)
    assert verdict == 'undecided' and (left > 0 or math.isnan(left))


def test_a_verdict_is_made_at_few_looks_whose_errors_sum_to_less_than_five_per_cent():
    clear = lambda method, arm: .9 if arm == 'own' else .7
    for seeds in (1, 3, 5):
        _, verdict, reason, left = say(clear, seeds)
        assert verdict == 'undecided' and 'when the next look is' in reason and not left <= 0
    assert sum(1 - confidence_at(look) for look in LOOKS) < .05 and confidence_at(5) == confidence_at(6)


def test_label_smoothing_and_tuned_attacks_have_as_many_tries():
    task = audit_task('digits', {'source': 'torchvision:resnet18'})
    found = seed_entries(task, own_teacher(task), 0, 5)
    tries = {column: len({e.choice for e in found if e.column == column}) for column in ('ls', f'kd{TUNED_END}', 'kd')}
    assert set(tries.values()) == {5, 1} and tries['kd'] == 1 and spread('abc', 9) == list('abc')
    assert {e.defense for e in found} == {'own', 'uniform', 'centroid', 'shuffled'}


BAD = { # name: arguments instead of the right ones, what the sentence says
    'no network': ({'--model': 'resnet18'}, 'model is \'resnet18\'; name torchvision:NAME'),
    'an unknown network': ({'--model': 'torchvision:resnet19'}, "Unknown network of torchvision 'resnet19'"),
    'a missing module': ({'--model': 'yours:answer'}, 'yours:answer cannot be imported (ModuleNotFoundError'),
    'a missing function': ({'--model': 'mine:reply'}, 'mine:reply cannot be imported (AttributeError'),
    'no function': ({'--model': 'mine:number'}, 'mine:number is a int; it must be a class or a function'),
    'an error in the function': ({'--model': 'mine:broken'}, 'mine:broken fails on images of shape (64, 3, 16, 16) (KeyError'),
    'too few classes': ({'--model': 'mine:few'}, 'with shape (64, 9)'),
    'probabilities': ({'--model': 'mine:odds'}, 'answers with probabilities; return logits'),
    'a missing file': ({'--model': 'none.onnx'}, 'none.onnx cannot be read'),
    'no TorchScript': ({'--model': 'text.pt'}, 'torchscript fails on images of shape'),
    'missing weights': ({'--model': 'mine:Net', '--weights': 'none.safetensors'}, 'none.safetensors cannot be read'),
    'damaged weights': ({'--model': 'mine:Net', '--weights': 'text.pt'}, 'cannot be read as weights'),
    'weights of another network': ({'--model': 'torchvision:resnet18', '--weights': 'net.safetensors'}, 'does not fit torchvision:resnet18'),
    'no images': ({'--data': 'nowhere'}, 'nowhere is neither a folder of images nor a data set'),
    'an empty folder': ({'--data': 'empty'}, 'empty has no class folders'),
    'no unit': ({'--budget': '30'}, 'write a time such as 90s, 30m or 2h'),
    'no part': ({'--thief-images': 'few'}, 'write a part such as 20% or 0.2'),
    'too large a part': ({'--thief-images': '120%'}, 'thief_images is 1.2'),
    'an unknown attack': ({'--attacks': 'theft'}, "Unknown attack 'theft'"),
    'an unknown student': ({'--student': 'cnn_huge'}, "Unknown network 'cnn_huge'"),
    'no tries': ({'--tries': '0'}, 'tries is 0'),
    'an unknown verdict': ({'--fail-on': 'stolen'}, "Unknown verdict 'stolen'"),
    'an unknown override': ({'--overrides': 'colour=red'}, "Unknown override 'colour'"),
    'two means': ({'--mean': '.5,.5'}, 'mean is [0.5, 0.5]; it must hold a number for each of 3 channels'),
    'an unknown option': ({'--colour': 'red'}, 'Unrecognized arguments: --colour red'),
    'a device that is not there': ({'--device': 'tpu'}, "Unknown device 'tpu'"),
}


@pytest.mark.parametrize('what', BAD)
def test_bad_input_is_one_sentence_and_exit_code_2(what, home, tree, capsys):
    changed, says = BAD[what]
    weights_of_a_class(home)
    (home/'text.pt').write_text('nothing')
    (home/'empty').mkdir()
    words = {'--model': 'mine:answer', '--data': str(tree), '--store': 'store', '--out': 'report', **dict(zip(WORDS[::2], WORDS[1::2], strict=True))}
    assert main(['audit', *(word for pair in {**words, **changed}.items() for word in pair)]) == 2
    printed = capsys.readouterr()
    assert says in printed.err and printed.err.startswith('error: ') and printed.err.count('\n') == 1 and printed.out == ''
    assert not (home/'report').exists()


def test_the_command_as_a_whole(home, tree, capsys):
    words = ['audit', '--model', 'mine:answer', '--data', str(tree), '--store', 'store', '--out', 'report', *WORDS, '--fail-on']
    assert main([*words, 'distillable']) == 0
    assert main([*words, 'distillable, undecided']) == 1
    printed = capsys.readouterr()
    assert 'Query budget: 90 questions of each attack.' in printed.out and 'failed: The verdict is undecided.' in printed.err
    machine, page = (home/'report'/'audit.json').read_text(), (home/'report'/'audit.html').read_text()
    facts = json.loads(machine)
    assert facts['students']['data budget'] == 120 and facts['verdict'] == 'undecided' and any('Other attacks' in s for s in facts['not tested'])
    assert 'What students gain' in page and 'No student was trained' not in page and 'Data budget' in page


PAIRS = '''
import torch
from safetensors.torch import load_file
from cmim_repro.lab.models.core import model

def net(num_classes): return model('cnn_medium', width=16, num_classes=num_classes, image_shape=(1, 8, 16))

def top1(images):
    teacher = net(16)
    teacher.load_state_dict(load_file('net.safetensors'))
    return torch.nn.functional.one_hot(teacher.eval()(images).argmax(1), 16).float().log()
'''


@pytest.mark.slow
def test_on_pairs_of_digits_a_teacher_is_distillable_within_minutes_and_its_top1_is_not(home):
    from cmim_repro.experiments.execution import execute
    from cmim_repro.experiments.profiles import protected
    from cmim_repro.experiments.runs import Plan
    from cmim_repro.experiments.tasks import quick_task
    (home/'pairs.py').write_text(PAIRS)
    teacher, store = protected(quick_task('digit_pairs'), 'ce', 'cnn_medium', 0), Store(home/'teachers')
    execute(Plan.of([teacher]), store)
    safetensors.torch.save_file(store.tensors(teacher, 'weights.safetensors'), home/'net.safetensors')
    started = time.monotonic()
    found = audit_model('pairs:net', 'digit_pairs', weights='net.safetensors', budget='3m', store=home/'store')
    assert found.verdict == 'distillable' and time.monotonic() - started < 200, found.reason
    assert ' gains +' in found.reason
    assert audit_model('pairs:top1', 'digit_pairs', budget='3m', store=home/'store').verdict != 'distillable'


def test_python_refuses_what_the_command_refuses(tree):
    with pytest.raises(Invalid, match='margin is -1'): audit_model('torchvision:resnet18', str(tree), margin=-1)
