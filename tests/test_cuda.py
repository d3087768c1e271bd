"""What only a CUDA device can show: autocast, compilation, memory formats, data on the device, no waiting, and resuming. Skipped, and said to be, where there is none.

Beside these, `-m cuda` selects test_cuda_numbers: attacks, CMIM's term and CMI. Neither file needs more than pytest and the package."""
import json
from dataclasses import replace

import pytest
import torch

from cmim_repro.attacks.core import attack
from cmim_repro.core import keyed_generator
from cmim_repro.defenses.core import objective
from cmim_repro.experiments.cost import throughput
from cmim_repro.lab.data.core import Crop, Facts, Flip, Rotation, TensorDataSet
from cmim_repro.lab.models.core import model
from cmim_repro.lab.training import Batch, Learner, Recipe, Settings, initialised, train

DEVICE = 'cuda'
pytestmark = pytest.mark.cuda
PLAIN = Settings(device=DEVICE, channels_last=False, tf32=False, checkpoint_seconds=0)


def pictures(device=DEVICE, count=96):
    "Bytes on the device: eight classes of noise with a brightness of their own."
    facts = Facts('noise', [f'class {i}' for i in range(8)], (.5,) * 3, (.25,) * 3, (Rotation(20), Crop(3, 'edge'), Flip()))
    labels = torch.arange(count) % 8
    images = (torch.randint(64, (count, 3, 16, 16), generator=keyed_generator(0, 'pictures')) + 24 * labels[:, None, None, None]).to(torch.uint8)
    return TensorDataSet(facts, {'train': images, 'test': images[:32]}, {'train': labels, 'test': labels[:32]}, device)


def learner(data, name='cnn_small', method='cmim', folder=None, **recipe):
    context = {'num_classes': 8, 'train_labels': data.labels('train'), 'seed': 0, 'image_shape': data.image_shape}
    loss = objective(method, **{k: v for k, v in context.items() if k in objective.context(method)})
    net = initialised(lambda: model(name, num_classes=8, image_shape=data.image_shape), 0)
    return Learner(f'{method} {name}', net, loss, Recipe(**{'epochs': 2, 'batch_size': 32, 'lr': .02, 'schedule': 'constant', **recipe}), folder=folder)


def trained(settings=PLAIN, **options):
    "A learner after two epochs."
    data = pictures(settings.device)
    one = learner(data, **options)
    train([one], data, seed=0, settings=settings)
    return one


def losses(one): return torch.tensor([line['train_loss'] for line in one.history])


def test_training_agrees_with_the_cpu():
    here, there = trained(), trained(Settings(device='cpu', channels_last=False))
    assert {p.device.type for p in here.model.parameters()} == {torch.device(DEVICE).type}
    torch.testing.assert_close(losses(here), losses(there), rtol=1e-2, atol=1e-3)


def test_autocast_keeps_weights_and_losses_in_float32():
    data, seen = pictures(), []
    one = learner(data, precision='bf16')
    handle = next(m for m in one.model.modules() if isinstance(m, torch.nn.Conv2d)).register_forward_hook(lambda module, args, result: seen.append(result.dtype))
    train([one], data, seed=0, settings=PLAIN)
    handle.remove()
    assert set(seen) == {torch.bfloat16}
    assert {p.dtype for p in one.model.parameters()} == {torch.float32} and one.logits(data.take('test', [0, 1]), None).dtype == torch.float32
    assert all(b.dtype != torch.bfloat16 for b in one.objective.buffers())
    torch.testing.assert_close(losses(one), losses(trained()), rtol=.05, atol=.02)


def test_channels_last_learns_the_same():
    one = trained(Settings(device=DEVICE, channels_last=True, tf32=False))
    weight = next(m for m in one.model.modules() if isinstance(m, torch.nn.Conv2d) and m.in_channels > 3).weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    torch.testing.assert_close(losses(one), losses(trained()), rtol=1e-2, atol=1e-3)


def test_images_are_bytes_on_the_device_and_are_augmented_there():
    here, there = pictures(), pictures('cpu')
    assert {x.dtype for x in here._images.values()} == {torch.uint8} and all(x.device == here.device for x in here._images.values())
    options = {'augment': 'standard', 'shuffle': True, 'seed': 3, 'epoch': 1}
    for one, other in zip(here.batches('train', 32, **options), there.batches('train', 32, **options), strict=True):
        assert all(x.device == here.device for x in one) and all(torch.equal(a.cpu(), b) for a, b in zip(one[1:], other[1:], strict=True))
        assert (one[0].cpu() - other[0]).abs().gt(1e-5).float().mean() < 1e-3 # a rotated pixel half way between two may go either way


@pytest.mark.parametrize('method', ['ce', 'cmim'])
def test_steps_do_not_wait_for_the_device(method):
    data = pictures(count=192)
    one = learner(data, method=method).place(torch.device(DEVICE), PLAIN)
    one.start_epoch()
    batches = enumerate(data.batches('train', 32, augment='standard', shuffle=True))
    for step, (images, labels, places) in batches: # the first steps may allocate and choose kernels, the third is recorded
        one.step(Batch(images, labels, places, None, 0, 0, step), data, 6)
        if DEVICE == 'cuda' and step > 2: torch.cuda.set_sync_debug_mode('error')
    if DEVICE == 'cuda': torch.cuda.set_sync_debug_mode('default')
    assert int(one.sums[2]) == 192 and (DEVICE == 'cpu' or recorded(one))


def recorded(one): return [take for take in one.captured.takes.values() if take.graph]


@pytest.mark.parametrize('name, method, precision', [('cnn_small', 'ce', 'float32'), ('cnn_small', 'cmim', 'bf16'), ('mobilenetv2', 'ce', 'float32'),
                                                     ('vgg8', 'cmim', 'float32')])
def test_recorded_steps_learn_the_same(name, method, precision):
    "With batch normalisation, a bank, depthwise convolutions, and dropout, whose random numbers a replay must take from the step's key."
    options = {'name': name, 'method': method, 'precision': precision, 'epochs': 4, 'lr': .005}
    plain, one = trained(replace(PLAIN, capture=False), **options), trained(**options)
    assert DEVICE == 'cpu' or recorded(one)
    torch.testing.assert_close(losses(one), losses(plain), rtol=2e-2, atol=5e-3)


@pytest.mark.parametrize('method, options', [('kd', {}), ('mkd', {}), ('dkd', {'warmup_epochs': 3}), ('dist', {}), ('avg', {}), ('htc', {})])
def test_recorded_attacks_learn_the_same(method, options):
    data = pictures()
    matrix = torch.randn(3*16*16, 8, generator=keyed_generator(1, 'teacher')).to(DEVICE)/20

    def attacker(settings):
        context = {'num_classes': 8, 'seed': 0}
        loss = attack(method, **options, **{k: v for k, v in context.items() if k in attack.context(method)})
        net = initialised(lambda: model('vgg8', num_classes=8, image_shape=data.image_shape), 0)
        one = Learner(method, net, loss, Recipe(epochs=4, batch_size=32, lr=.02, schedule='cosine'))
        train([one], data, 0, lambda images: (images.flatten(1) @ matrix).log_softmax(1), settings)
        return one

    plain, one = attacker(replace(PLAIN, capture=False)), attacker(PLAIN)
    assert DEVICE == 'cpu' or recorded(one)
    torch.testing.assert_close(losses(one), losses(plain), rtol=2e-2, atol=5e-3)


def test_learners_on_lanes_are_those_alone():
    "Six learners with dropout on four lanes."
    data = pictures()
    cohort = [learner(data, 'vgg8', epochs=4, lr=rate) for rate in (.01, .015, .02, .025, .03, .035)]
    train(cohort, data, seed=0, settings=PLAIN)
    for one, rate in zip(cohort, (.01, .015, .02, .025, .03, .035), strict=True):
        torch.testing.assert_close(losses(one), losses(trained(name='vgg8', epochs=4, lr=rate)), rtol=2e-2, atol=5e-3)


@pytest.fixture(autouse=True)
def waiting_is_allowed_again():
    yield
    if DEVICE == 'cuda' and torch.cuda.is_available(): torch.cuda.set_sync_debug_mode('default')


class Stop(Exception): pass


@pytest.mark.parametrize('precision', ['float32', 'bf16'])
def test_an_interrupted_run_goes_on_from_its_checkpoint(tmp_path, precision):
    data, options = pictures(), {'epochs': 3, 'precision': precision}

    def stop(one):
        if one.epoch == 2: raise Stop

    with pytest.raises(Stop): train([learner(data, folder=tmp_path, **options)], data, seed=0, settings=PLAIN, on_epoch=stop)
    saved = torch.load(tmp_path / 'checkpoint.pt', weights_only=True)
    epochs, resumed = saved['epoch'], learner(data, folder=tmp_path, **options)
    train([resumed], data, seed=0, settings=PLAIN)
    assert epochs in (1, 2) and resumed.epoch == 3 and {p.device.type for p in resumed.model.parameters()} == {torch.device(DEVICE).type}
    assert {b.device.type for b in resumed.objective.buffers()} == {torch.device(DEVICE).type}
    lines = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
    assert [line['epoch'] for line in lines] == [1, 2, 3]
    torch.testing.assert_close(losses(resumed), losses(trained(**options)), rtol=1e-2, atol=1e-3)


def test_throughput_reports_memory_on_the_device():
    table = throughput('cnn_tiny', num_classes=10, batch_size=32, num_samples=500, precision='bf16', steps=2, blocks=2, settings=Settings(device=DEVICE))
    assert (table['images/s'] > 0).all() and (DEVICE == 'cpu' or (table['peak memory (MiB)'] > 0).all())


def test_compiled_networks_learn_the_same():
    torch._dynamo.reset()
    compiled = trained(Settings(device=DEVICE, channels_last=False, tf32=False, compile=True))
    torch.testing.assert_close(losses(compiled), losses(trained()), rtol=1e-2, atol=1e-3)
