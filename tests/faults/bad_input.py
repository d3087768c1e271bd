"""Arrays and files that cannot be used: whatever measures or reads them must refuse each in one sentence."""
import io
import pickle
from functools import partial

import numpy as np
import torch
from PIL import Image
from safetensors.numpy import save as save_tensors

from cmim_repro.audits.answers import make_answers, read_answers
from cmim_repro.lab.data.core import dataset
from cmim_repro.theory.cmi import class_centroids, class_cmi, cmi, cmi_curve

ROWS, CLASSES = 12, 3
SCORES = torch.randn(ROWS, CLASSES, generator=torch.Generator().manual_seed(0)).double().log_softmax(1)
LABELS = torch.arange(ROWS) % CLASSES


def with_first(values, value):
    changed = values.clone()
    changed[0] = value
    return changed


BOTH = { # no function can use these
    'NaN': with_first(SCORES, float('nan')), 'infinity': with_first(SCORES, float('inf')), 'a row of zeros': with_first(SCORES, -float('inf')),
    'per cents': 100*SCORES.exp(), 'whole numbers': torch.ones(ROWS, CLASSES, dtype=torch.long), 'truth values': torch.ones(ROWS, CLASSES, dtype=torch.bool),
    'complex numbers': SCORES.to(torch.complex128), 'a number': torch.tensor(1.), 'one dimension': SCORES[:, 0], 'no rows': SCORES[:0]}
OBJECTS = {'texts': np.full((ROWS, CLASSES), 'a'), 'objects': np.full((ROWS, CLASSES), None)}
PROBABLE = {'probabilities': SCORES.exp(), 'scores that are no distributions': SCORES + 1, 'one bad row': with_first(SCORES, -1.)} # an audit takes logits too
LABELLED = {'too high': with_first(LABELS, CLASSES), 'negative': with_first(LABELS, -1), 'ignored': with_first(LABELS, -100), 'from one': LABELS + 1, 'too few': LABELS[:-1],
            'too many': torch.cat([LABELS, LABELS]), 'two dimensions': LABELS.repeat(2, 1), 'halves': LABELS + .5, 'none': LABELS[:0]}
MEASURES = {'class_centroids': partial(class_centroids, num_classes=CLASSES),
            'class_cmi': partial(class_cmi, num_classes=CLASSES), 'cmi': cmi, 'cmi_curve': partial(cmi_curve, alphas=[1.]), 'make_answers': make_answers}


def arrays():
    "What is called, and what with, in a sentence and as a function without arguments."
    for name, measure in MEASURES.items():
        for what, scores in {**BOTH, **(OBJECTS if name == 'make_answers' else PROBABLE)}.items(): yield f'{name}: {what}', partial(measure, scores, LABELS)
        for what, labels in LABELLED.items(): yield f'{name}: labels {what}', partial(measure, SCORES, labels)


def packed(**arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def rows(*lines): return '\n'.join(lines).encode()


PROBS, GOOD_LABELS = SCORES.exp().numpy(), LABELS.numpy()
GOOD = {'.npz': packed(probs=PROBS, labels=GOOD_LABELS), '.safetensors': save_tensors({'probs': PROBS, 'labels': GOOD_LABELS})}
BROKEN = {'nothing': b'', 'text': b'hello', 'zeros': bytes(300), 'bytes': bytes(range(256))*3}
HEAD = 'a,b,c,label'
OWN = {'.npz': {'no labels': packed(probs=PROBS), 'no answers': packed(labels=GOOD_LABELS), 'objects': packed(probs=np.array([{}, []], dtype=object), labels=GOOD_LABELS),
                'other names': packed(x=PROBS, y=PROBS), 'no arrays': packed(), 'one class': packed(probs=PROBS[:, :1], labels=GOOD_LABELS)},
       '.safetensors': {'a long header': b'\xff'*8 + b'{}', 'no tensors': save_tensors({}), 'no labels': save_tensors({'probs': PROBS})},
       '.csv': {'no rows': rows(HEAD), 'words': rows(HEAD, 'x,y,z,0', 'x,y,z,1'), 'holes': rows(HEAD, '.2,,.3,0', '.2,.3,.5,1'),
                'uneven': rows(HEAD, '.2,.3,.5,0', '.2,.3,.5,1,7,8'),
                 'no label': rows('a,b,c', '.2,.3,.5'), 'labels beyond': rows(HEAD, '.2,.3,.5,9'), 'label words': rows(HEAD, '.2,.3,.5,cat')},
       '.npy': {'no labels': packed()}, '.txt': {'an ending that is none': b'1'}}


def png(side=8):
    file = io.BytesIO()
    Image.new('RGB', (side, side), 'red').save(file, 'PNG')
    return file.getvalue()


def answer_files(folder):
    for ending, own in OWN.items():
        good = GOOD.get(ending, b'')
        cut = {f'{part} of 8 parts': good[:len(good)*part//8] for part in (1, 3, 5, 7)} if good else {}
        for what, content in {**BROKEN, **cut, **own}.items():
            path = folder/f'answers{ending}'
            yield f'answers{ending}: {what}', path, content, partial(read_answers, path)


def image_files(folder):
    for name in ('a', 'b'):
        (folder/'images'/name).mkdir(parents=True, exist_ok=True)
        for i in range(4): (folder/'images'/name/f'{i}.png').write_bytes(png())
    path = folder/'images'/'b'/'3.png'
    changed = {f'{part} of 8 parts': png()[:len(png())*part//8] for part in (1, 3, 5)}
    for what, content in {**BROKEN, **changed, 'a wrong sum': png().replace(b'IDAT', b'IDAX')}.items():
        yield f'an image: {what}', path, content, partial(dataset, 'folder', path=str(folder/'images'))


def pickles(folder):
    place = folder/'cifar-100-python'
    place.mkdir(exist_ok=True)
    record = {'data': np.zeros((4, 3072), np.uint8), 'fine_labels': [0, 1, 2, 3], 'coarse_labels': [0, 1, 2, 3]}
    for name in ('train', 'test', 'meta'): (place/name).write_bytes(pickle.dumps(record))
    changes = {'a list': [1], 'no images': {**record, 'data': None}, 'short images': {**record, 'data': np.zeros((4, 30), np.uint8)},
               'numbers': {**record, 'data': np.zeros((4, 3072))}, 'labels beyond': {**record, 'fine_labels': [0, 1, 2, 300]},
               'few labels': {**record, 'fine_labels': [0]}, 'a command': {**record, 'x': print}}
    for what, content in {**BROKEN, **{name: pickle.dumps(value) for name, value in changes.items()}}.items():
        yield f'a pickle: {what}', place/'train', content, partial(dataset, 'cifar100', root=folder, allow_unverified=True)


def files(folder):
    "What is read, in a sentence and as a function without arguments; the file is spoiled when it is its turn."
    for found in (answer_files, image_files, pickles):
        for what, path, content, read in found(folder): yield what, partial(spoiled, path, content, read)


def spoiled(path, content, read):
    path.write_bytes(content)
    return read()
