"Every network: parameter counts, shapes, gradients, memory formats, graph capture, and refused input."
import csv
import functools
import hashlib
import io
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import pytest
import torch
import torchvision

from cmim_repro.core import Invalid, Unusable
from cmim_repro.lab.models.core import count_parameters, describe, model, sketch
from cmim_repro.lab.training import initialised

COUNTS = {  # at 100 classes and three channels
    'vgg8': 3_965_028, 'vgg11': 28_518_244, 'vgg13': 28_703_140, 'vgg16': 34_015_396,
    'resnet18': 11_220_132, 'resnet34': 21_328_292, 'resnet50': 23_705_252, 'resnet101': 42_697_380,
    'resnet152': 58_341_028, 'squeezenet': 781_156, 'resnext50': 14_788_772, 'mobilenet': 3_315_428,
    'mobilenetv2': 2_369_380, 'xception': 21_013_988, 'densenet121': 7_048_548, 'shufflenetv2': 1_360_896}
TORCHVISION = {'imagenet_resnet18': 'resnet18', 'imagenet_resnet34': 'resnet34', 'imagenet_resnet50': 'resnet50',
               'imagenet_mobilenetv2': 'mobilenet_v2'}
SMALL = ('cnn_tiny', 'cnn_small', 'cnn_medium', 'resnet8', 'resnet14', 'resnet20')
VGG = ('vgg11', 'vgg13', 'vgg16')
KNOWN, NAMES = (*SMALL, *COUNTS, *TORCHVISION), model.names() # whatever is registered besides is tested too
FREE = [name for name in (*SMALL, *COUNTS) if name not in VGG]


@functools.cache
def shape_of(name):
    "Images that the network takes."
    if name in KNOWN: return (3, 64, 64) if name in TORCHVISION else (3, 32, 32)
    for shape in ((3, 32, 32), (1, 8, 8), (3, 64, 64), (3, 224, 224)):
        try: return shape if sketch(name, num_classes=5, image_shape=shape) else None
        except Invalid: continue
    raise AssertionError(f'{name} takes images of no usual shape')


def build(name, num_classes=5):
    torch.manual_seed(0)
    return model(name, num_classes=num_classes, image_shape=shape_of(name))


@pytest.fixture(scope='module', params=NAMES)
def name(request): return request.param


@pytest.fixture(scope='module')
def net(name): return build(name)


@pytest.fixture
def images(name): return torch.randn(2, *shape_of(name), generator=torch.Generator().manual_seed(1))


def test_the_registry_has_these_names(): assert set(KNOWN) <= set(model.names())


@pytest.mark.parametrize('name', COUNTS)
def test_parameter_counts_at_100_classes(name): assert count_parameters(sketch(name)) == COUNTS[name]


@pytest.mark.parametrize('name, count', [
    ('resnet18', 11_271_432), ('resnet34', 21_379_592), ('resnet50', 23_910_152), ('shufflenetv2', 1_463_396),
    ('vgg8', 4_016_328)])
def test_parameter_counts_for_tinyimagenet(name, count):
    assert count_parameters(sketch(name, num_classes=200, image_shape=(3, 64, 64))) == count


@pytest.mark.parametrize('name', TORCHVISION)
def test_parameter_counts_of_torchvision(name):
    published = torchvision.models.get_model_weights(TORCHVISION[name]).IMAGENET1K_V1
    assert count_parameters(sketch(name)) == published.meta['num_params']


@pytest.mark.parametrize('name', ['resnet50', 'vit_b_16', 'swin_t', 'mobilenet_v2', 'densenet121'])
def test_multiply_adds_are_the_published_ones(name):
    "Of torchvision's own networks, in thousand millions; attention is not a layer with weights, but counts."
    with torch.device('meta'): net = torchvision.models.get_model(name)
    published = torchvision.models.get_model_weights(name).IMAGENET1K_V1.meta['_ops']
    assert describe(net, (3, 224, 224))['multiply-adds'].iloc[-1]/1e9 == pytest.approx(published, abs=1e-3)


def test_counting_computes_nothing():
    "On real weights, which stay as they are, and with a fast path that would hide attention."
    net = torch.nn.Sequential(torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)).eval()
    before, total = {k: v.clone() for k, v in net.state_dict().items()}, describe(net, (16, 32)).loc['total']
    assert total['multiply-adds'] == 16*32*(4*32 + 2*64) + 2*16*16*32
    assert all(value.equal(before[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize('num_classes', [2, 10, 100, 200])
@pytest.mark.parametrize('name', NAMES)
def test_logits_for_any_number_of_classes(name, num_classes):
    net = sketch(name, num_classes=num_classes, image_shape=shape_of(name)).eval()
    assert net(torch.zeros(3, *shape_of(name), device='meta')).shape == (3, num_classes)


@pytest.mark.parametrize('shape', [(1, 8, 8), (1, 28, 28), (3, 64, 64), (4, 33, 40)])
@pytest.mark.parametrize('name', FREE)
def test_other_image_shapes(name, shape):
    net = sketch(name, num_classes=7, image_shape=shape).train()
    assert net(torch.zeros(2, *shape, device='meta')).shape == (2, 7)


@pytest.mark.parametrize('name', VGG)
def test_vgg_refuses_what_its_first_linear_layer_cannot_take(name):
    for side in (31, 64):
        with pytest.raises(Invalid, match=rf"image_shape is \(3, {side}, {side}\); network '{name}' .* of 32 to 63 "
                                          r"pixels"):
            model(name, image_shape=(3, side, side))
    for side in (32, 63):
        assert sketch(name, image_shape=(1, side, side))(torch.zeros(2, 1, side, side, device='meta')).shape == (2, 100)


@pytest.mark.parametrize('training', [False, True])
def test_forward_and_backward_are_finite(net, images, training):
    net.train(training).zero_grad(set_to_none=True)
    torch.nn.functional.cross_entropy(net(images), torch.tensor([0, 1])).backward()
    for parameter, value in net.named_parameters():
        assert value.grad is not None and value.grad.isfinite().all(), parameter


@torch.no_grad()
def test_channels_last_changes_nothing(net, images):
    net.eval()
    expected = net(images)
    try: actual = net.to(memory_format=torch.channels_last)(images.contiguous(memory_format=torch.channels_last))
    finally: net.to(memory_format=torch.contiguous_format)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


# Deeper copies of what is captured and lowered anyway, and torchvision's own: capture is enough here;
# `test_compiled` (slow) compiles all, with their backward pass.
DEEPER = ('vgg13', 'vgg16', 'resnet14', 'resnet34', 'resnet101', 'resnet152', *TORCHVISION)
LONG = ('densenet121', 'resnet101', 'resnet152') # The captures that take longest


@pytest.mark.parametrize('name',
                         [pytest.param(name, marks=pytest.mark.slow) if name in LONG else name for name in NAMES])
@torch.no_grad()
def test_one_graph(name):
    if name == 'own': pytest.skip("somebody else's, behind checks")
    torch._dynamo.reset()
    net, images = build(name).eval(), torch.randn(2, *shape_of(name), generator=torch.Generator().manual_seed(1))
    captured = torch.compile(net, backend='eager' if name in DEEPER else 'aot_eager', fullgraph=True)
    torch.testing.assert_close(captured(images), net(images), rtol=1e-4, atol=1e-5)


def test_the_head_is_linear_in_the_averaged_features(name, net, images):
    if name in VGG or name not in (*SMALL, *COUNTS): pytest.skip('has another head')
    net.eval()
    last = [layer for layer in net.head if hasattr(layer, 'weight')]
    assert len(last) == 1 and last[0].bias is not None
    features = net[:-1](images).mean((2, 3))
    torch.testing.assert_close(net(images), features @ last[0].weight.flatten(1).T + last[0].bias, rtol=1e-4, atol=1e-5)


def check_compiled(name, shape):
    "In float64: in float32 a ReLU whose input is zero but for the last bits may be open in one and shut in the other."
    torch._dynamo.reset()
    torch.manual_seed(0)
    net, labels = model(name, num_classes=5, image_shape=shape).eval().double(), torch.tensor([0, 1])
    images = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = []
    for forward in (net, torch.compile(net, fullgraph=True)):
        net.zero_grad(set_to_none=True)
        torch.nn.functional.cross_entropy(forward(images), labels).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-6, atol=1e-9 * gradients[0].abs().max().item())


def test_compiled_cnn_small(): check_compiled('cnn_small', (1, 8, 8))


@pytest.mark.slow
@pytest.mark.parametrize('name', sorted({*NAMES} - {'own'})) # somebody else's, behind checks that a graph cannot hold
def test_compiled(name): check_compiled(name, shape_of(name))


def test_the_same_seed_gives_the_same_weights():
    first, second = build('cnn_small').state_dict(), build('cnn_small').state_dict()
    assert all(first[key].equal(second[key]) for key in first)


def test_no_activation_works_in_place(name):
    if name in (*TORCHVISION, 'own'): pytest.skip("torchvision's own")
    assert not any(getattr(layer, 'inplace', False) for layer in sketch(name, image_shape=shape_of(name)).modules())


def test_table_of_a_frozen_network_keeps_every_mode():
    net = build('cnn_tiny').train()
    net.stem.eval()
    totals = describe(net).loc['total']
    assert net.training and net.head.training and not net.stem[0].training
    assert totals['parameters'] == count_parameters(net)


def test_unknown_names_options_and_classes():
    with pytest.raises(Invalid, match="Unknown network 'vgg12'; accepted: .*vgg11, vgg13"): model('vgg12')
    with pytest.raises(Invalid, match="Unknown option of network 'resnet18' 'width'; accepted: none"):
        model('resnet18', width=3)
    with pytest.raises(Invalid, match='num_classes is 1; it must be a whole number from 2'):
        model('resnet18', num_classes=1)
    with pytest.raises(Invalid,
                       match=r"image_shape is \(1, 4, 4\); network 'densenet121' takes .* from 8 pixels a side"):
        model('densenet121', image_shape=(1, 4, 4))
    with pytest.raises(Invalid, match='width is 0'): model('resnet8', width=0)
    with pytest.raises(Invalid, match='width is 0'): model('cnn_small', width=0)


def test_published_weights_that_cannot_be_downloaded(monkeypatch, tmp_path):
    def refuse(*_, **__): raise URLError('no route to host')
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    monkeypatch.setattr(torch.hub, 'download_url_to_file', refuse)
    with pytest.raises(Unusable, match="The weights of 'resnet18' cannot be loaded .*no route to host.*; fetch "
                                       "https://.*resnet18"):
        model('imagenet_resnet18', pretrained=True)


def published(monkeypatch, tmp_path, content):
    "A file in the cache that is taken for the published one: its name has its sum."
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    path = tmp_path/'hub'/'checkpoints'/f'mobilenet-{hashlib.sha256(content).hexdigest()[:8]}.pth'
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    known = {'IMAGENET1K_V1': SimpleNamespace(url=f'https://nowhere/{path.name}')}
    monkeypatch.setattr(torchvision.models, 'get_model_weights', lambda name: known)
    return path


def saved(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def test_published_weights_are_read_from_the_cache(monkeypatch, tmp_path):
    weights = torchvision.models.mobilenet_v2().state_dict()
    path = published(monkeypatch, tmp_path, saved(weights))
    net = model('imagenet_mobilenetv2', pretrained=True)
    assert all(value.equal(weights[key]) for key, value in net.state_dict().items())
    path.write_bytes(saved(torchvision.models.mobilenet_v2().state_dict())) # random ones under the published name
    with pytest.raises(Unusable, match='has the SHA-256 .* of its name'): model('imagenet_mobilenetv2', pretrained=True)


class Evil:
    def __reduce__(self): return Path.touch, (Path('escaped'),)


@pytest.mark.parametrize('value', [Evil(), {'a': torch.zeros(1)}], ids=['code', 'other weights'])
def test_a_file_of_weights_runs_nothing(monkeypatch, tmp_path, value):
    monkeypatch.chdir(tmp_path)
    published(monkeypatch, tmp_path, saved(value))
    with pytest.raises(Unusable, match="The weights of 'mobilenet_v2' cannot be loaded") as said:
        model('imagenet_mobilenetv2', pretrained=True)
    assert '\n' not in str(said.value) and not Path('escaped').exists()


WEIGHTS = list(csv.DictReader((Path(__file__).parent/'golden'/'initial_weights.csv').read_text().splitlines()))


@pytest.mark.parametrize('line', WEIGHTS, ids=lambda line: f"{line['network']}-{line['image']}")
def test_a_seed_draws_the_weights_that_it_drew(line):
    "The order in which blocks are made decides their weights: another order, and finished runs would not come out again."
    shape = tuple(map(int, line['image'].split('x')))
    net = initialised(lambda: model(line['network'], num_classes=10, image_shape=shape), 0)
    total = sum((i % 7 + 1)*p.detach().double().abs().sum().item() for i, p in enumerate(net.parameters()))
    assert total == pytest.approx(float(line['sum']), rel=1e-6)
