"Files of images: every kind of pixel, upright, and one rule for which files count; the same for all data sets that are folders."
import os
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from torchvision.transforms import v2

from cmim_repro.core import Unusable
from cmim_repro.lab.data.core import dataset, folders_in, images_in, listing_sum, open_image, sha256

FOLDERS = ('imagenet', 'folder', 'tinyimagenet')


def grey(value, size=(64, 64)): return Image.new('L', size, value)


def save(image, path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **{'format': 'PNG'} | options)
    return path


class Tree:
    "A data set of one grey image in each class, its first class's folder, and what is read from it."
    def __init__(self, kind, root):
        self.kind, self.root = kind, root
        self.home = root if kind == 'folder' else root/'train'/'n01'/'images' if kind == 'tinyimagenet' else root/'train'/'n01'
        save(grey(1), self.home/'a.png')
        if kind == 'folder': return
        inner = 'images/' if kind == 'tinyimagenet' else ''
        save(grey(2), root/'train'/'n02'/f'{inner}b.png')
        for i, wnid in enumerate(('n01', 'n02')): save(grey(i), root/'val'/('images' if inner else wnid)/f'{wnid}.png')
        if not inner: return
        (root/'wnids.txt').write_text('n01\nn02\n')
        (root/'words.txt').write_text('n01\tone\nn02\ttwo\n')
        (root/'val'/'val_annotations.txt').write_text('n01.png\tn01\t0\t0\t1\t1\nn02.png\tn02\t0\t0\t1\t1\n')

    def data(self):
        if self.kind == 'folder': return dataset('folder', path=str(self.root), image_shape=(3, 64, 64))
        options = {'image_size': 64, 'workers': 0} if self.kind == 'imagenet' else {}
        return dataset(self.kind, root=self.root, **options)

    def pixels(self):
        "Bytes (N, 64, 64) of the first class's training images, in their order: the red channel."
        data = self.data()
        places = (data.labels('train') == 0).nonzero()[:, 0]
        return (data.pictures(data.take('train', places))*255).round().to(torch.uint8)[:, 0]

    def greys(self): return self.pixels()[:, 0, 0].tolist()


@pytest.fixture(params=FOLDERS)
def tree(request, tmp_path, monkeypatch):
    monkeypatch.setenv('CMIM_DATA', str(tmp_path/'downloads'))
    # ImageNet's images are handed out as they are decoded, not scaled and cut
    monkeypatch.setattr('cmim_repro.lab.data.imagenet.image_transform', lambda size, augment: v2.PILToTensor())
    return Tree(request.param, tmp_path/'tree')


# ---- pixels

def png(values, colour, bits=16):
    "A PNG file by hand, since Pillow writes no colours of 16 bits: values (H, W, ch), PNG's colour type."
    chunk = lambda name, content: struct.pack('>I', len(content)) + name + content + struct.pack('>I', zlib.crc32(name + content))
    rows = b''.join(b'\0' + row.astype('>u2').tobytes() for row in values)
    head = struct.pack('>IIBBBBB', values.shape[1], values.shape[0], bits, colour, 0, 0, 0)
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', head) + chunk(b'IDAT', zlib.compress(rows)) + chunk(b'IEND', b'')


RAMP = np.linspace(0, 65535, 64*64).astype(np.uint16).reshape(64, 64)


def test_grey_of_16_bits_is_scaled(tree):
    save(Image.fromarray(RAMP), tree.home/'a.png')
    tree.home.joinpath('b.png').write_bytes(png(RAMP[..., None], 0))
    expected = (RAMP/257).round().astype(np.uint8)
    for image in tree.pixels().numpy(): assert np.array_equal(image, expected)


@pytest.mark.parametrize('kind', ['I;16', 'I;16B', 'I'])
@pytest.mark.parametrize('mode', ['L', 'RGB'])
def test_every_16_bit_mode_of_pillow_is_scaled(tmp_path, kind, mode):
    stored = {'I;16': '<u2', 'I;16B': '>u2', 'I': np.int32}[kind]
    image = Image.frombytes(kind, (64, 64), RAMP.astype(stored).tobytes())
    save(image, tmp_path/'grey.png', format='TIFF')
    assert Image.open(tmp_path/'grey.png').mode == kind
    found = np.asarray(open_image(tmp_path/'grey.png', mode=mode))
    assert np.array_equal(found if mode == 'L' else found[..., 2], (RAMP/257).round())


@pytest.mark.parametrize('values', [[0., .5], [0., 1e9]], ids=str)
def test_real_numbers_have_no_scale(tree, values):
    save(Image.fromarray(np.resize(np.float32(values), (64, 64))), tree.home/'bad.png', format='TIFF')
    refused(tree, 'bad.png is not a readable image (its grey values, of mode F')


@pytest.mark.parametrize('value', [-1, 65536, 2**31 - 1])
def test_grey_beyond_16_bits_is_refused(tree, value):
    values = RAMP.astype(np.int32)
    values[3, 4] = value
    save(Image.fromarray(values), tree.home/'bad.png', format='TIFF')
    refused(tree, 'bad.png is not a readable image (its grey values, of mode I, go beyond 16 bits')


def refused(tree, words):
    with pytest.raises(Unusable) as refusal: tree.pixels()
    assert words in str(refusal.value) and '\n' not in str(refusal.value)


@pytest.mark.parametrize('colour, channels', [(2, 3), (4, 2), (6, 4)], ids=['RGB', 'LA', 'RGBA'])
def test_colours_of_16_bits_keep_their_high_byte(tree, colour, channels):
    values = np.stack([RAMP]*channels, -1)
    values[..., -1:] = 65535 if channels != 3 else values[..., -1:]
    tree.home.joinpath('a.png').write_bytes(png(values, colour))
    [found] = tree.pixels().numpy()
    assert np.array_equal(found, RAMP >> 8) and np.abs(found - RAMP/257).max() <= 1


def transparent():
    "A palette of two colours, the second transparent, given byte by byte."
    image = Image.fromarray((np.arange(64*64) % 2).astype(np.uint8).reshape(64, 64), 'L').convert('P')
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.info['transparency'] = b'\xff\x00'
    return image


@pytest.mark.filterwarnings('error')
def test_other_kinds_of_pixels(tree):
    half = np.where(np.arange(64*64).reshape(64, 64) % 2, 255, 0).astype(np.uint8)
    save(Image.fromarray(half).convert('1'), tree.home/'a.png')
    save(transparent(), tree.home/'b.png')
    save(Image.new('CMYK', (64, 64), (0, 255, 255, 0)), tree.home/'c.jpg', format='TIFF') # red
    save(Image.new('LA', (64, 64), (90, 0)), tree.home/'d.png')
    save(Image.new('RGBA', (64, 64), (80, 0, 0, 0)), tree.home/'e.png')
    save(grey(33), tree.home/'f.png', transparency=33)
    one, two, *rest = tree.pixels()
    assert np.array_equal(one, half) and two[0, :2].tolist() == [10, 200]
    assert [sorted(set(image.flatten().tolist())) for image in rest] == [[255], [90], [80], [33]]


# ---- orientation

ARROW = np.add.outer(np.arange(64)*3, np.arange(64)).astype(np.uint8) # no symmetry


def oriented(number):
    exif = Image.Exif()
    exif[0x112] = number
    return exif


@pytest.mark.parametrize('number', range(1, 9))
def test_orientation_is_followed(tree, number):
    save(Image.fromarray(ARROW), tree.home/'a.png', exif=oriented(number))
    save(Image.fromarray(ARROW).convert('RGB'), tree.home/'b.webp', format='WEBP', lossless=True, exif=oriented(number))
    turned = {1: ARROW, 2: ARROW[:, ::-1], 3: ARROW[::-1, ::-1], 4: ARROW[::-1], 5: ARROW.T, 6: np.rot90(ARROW, -1),
              7: ARROW[::-1, ::-1].T, 8: np.rot90(ARROW)}[number]
    for image in tree.pixels().numpy(): assert np.array_equal(image, turned)


def test_orientation_of_16_bits_and_of_jpeg(tree):
    save(Image.fromarray(RAMP), tree.home/'a.png', exif=oriented(6))
    save(Image.fromarray(ARROW), tree.home/'b.jpg', format='JPEG', quality=100, exif=oriented(8))
    wide, other = tree.pixels().numpy().astype(int)
    assert np.array_equal(wide, np.rot90((RAMP/257).round(), -1)) and np.abs(other - np.rot90(ARROW).astype(int)).max() <= 3


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.binary(max_size=40), st.tuples(st.integers(0, 60), st.integers(0, 255))))
@pytest.mark.filterwarnings('ignore')
def test_damaged_exif_data_do_not_stop_an_image(tmp_path_factory, damage):
    content = bytearray(oriented(3).tobytes())
    if isinstance(damage, tuple): content[damage[0] % len(content)] = damage[1]
    else: content = content[:6] + damage
    path = save(Image.fromarray(ARROW), tmp_path_factory.getbasetemp()/'exif.png', exif=bytes(content))
    found = np.asarray(open_image(path, mode='L'))
    assert sorted(found.flatten()) == sorted(ARROW.flatten()) # the same pixels, turned somehow or not at all


# ---- which files count

def test_names_with_a_dot_are_left_out_at_any_depth(tree):
    for name in ('.b.png', '._a.png', '.ipynb_checkpoints/a-checkpoint.png', 'deep/.hidden/c.png', 'deep/.d.png'):
        save(grey(99), tree.home/name)
    save(grey(5), tree.home/'deep'/'er'/'e.png')
    assert tree.greys() == [1, 5]
    if tree.kind == 'folder': return
    shutil.copytree(tree.root/'train'/'n01', tree.root/'train'/'.ipynb_checkpoints')
    shutil.copytree(tree.root/'val', tree.root/'val'/'.Trash')
    assert tree.greys() == [1, 5]


def test_endings_in_any_case_at_any_depth(tree):
    for value, name in enumerate(('b.JPEG', 'c.Jpg', 'sub/d.bmp', 'sub/e.WebP', 'sub/sub/f.PNG'), 10): save(grey(value), tree.home/name)
    for name in ('g.txt', 'sub/h.png.bak', 'png', 'sub/i.gif', 'j.tiff'): save(grey(99), tree.home/name)
    (tree.home/'folder.png').mkdir()
    assert tree.greys() == [1, 10, 11, 12, 13, 14]


def test_links_are_followed(tree, tmp_path):
    save(grey(7), tmp_path/'elsewhere'/'inner'/'b.png')
    save(grey(8), tmp_path/'another.data')
    (tree.home/'linked').symlink_to(tmp_path/'elsewhere')
    (tree.home/'m.png').symlink_to(tmp_path/'another.data')
    assert tree.greys() == [1, 7, 8]


def test_a_link_that_points_back_above_lists_nothing_twice(tree, tmp_path):
    save(grey(7), tree.home/'sub'/'deep'/'b.png')
    for name, target in {'here': '.', 'up': '..', 'top': tree.root, 'outside': tmp_path, 'root': '/'}.items():
        (tree.home/name).symlink_to(target)
        (tree.home/'sub'/'deep'/name).symlink_to(target)
    (tree.home/'sub'/'deep'/'sub').symlink_to(tree.home/'sub')
    assert tree.greys() == [1, 7]
    if tree.kind == 'folder': return
    (tree.root/'train'/'again').symlink_to(tree.root/'train')
    (tree.root/'train'/'above').symlink_to('..')
    assert tree.greys() == [1, 7]


def test_a_link_back_through_a_link_lists_nothing_twice(tree, tmp_path):
    save(grey(7), tmp_path/'elsewhere'/'b.png')
    (tree.home/'linked').symlink_to(tmp_path/'elsewhere')
    for name, target in {'back': tree.home, 'over': tree.root}.items(): (tmp_path/'elsewhere'/name).symlink_to(target)
    assert tree.greys() == [1, 7]


def test_a_tree_that_is_a_link_itself(tree, tmp_path):
    (tree.home/'up').symlink_to('..')
    shutil.move(tree.root, tmp_path/'moved')
    tree.root.symlink_to(tmp_path/'moved')
    assert tree.greys() == [1]


def test_a_class_folder_may_be_a_link(tree, tmp_path):
    if tree.kind == 'folder': pytest.skip('has no classes')
    shutil.move(tree.root/'train'/'n01', tmp_path/'far')
    (tree.root/'train'/'n01').symlink_to(tmp_path/'far')
    assert tree.greys() == [1] and tree.data().num_classes == 2


@pytest.mark.parametrize('target', ['nowhere', 'lost.png', '../gone/x'])
@pytest.mark.parametrize('name', ['lost.png', 'sub/lost', 'notes'])
def test_a_link_that_leads_nowhere_is_named(tree, name, target):
    (tree.home/name).parent.mkdir(exist_ok=True)
    (tree.home/name).symlink_to(target)
    refused(tree, f'{tree.home/name} is a link that leads nowhere; mend it.')
    (tree.home/name).rename((tree.home/name).with_name('.lost')) # hidden names do not count
    assert tree.greys() == [1]


def test_a_class_folder_that_leads_nowhere_is_named(tree):
    if tree.kind == 'folder': pytest.skip('has no classes')
    (tree.root/'train'/'n03').symlink_to('nowhere')
    refused(tree, f"{tree.root/'train'/'n03'} is a link that leads nowhere")


def test_a_folder_that_may_not_be_read_is_named(tree, monkeypatch):
    (tree.home/'locked').mkdir()

    def scan(path, scandir=os.scandir):
        if Path(path).name == 'locked': raise PermissionError(13, 'Permission denied')
        return scandir(path)

    monkeypatch.setattr('cmim_repro.lab.data.core.os.scandir', scan)
    refused(tree, f"{tree.home/'locked'} cannot be read (Permission denied).")


def test_what_is_no_file_is_left_out(tree):
    os.mkfifo(tree.home/'pipe.png')
    assert tree.greys() == [1]


# ---- sums

def test_sums_of_a_plain_tree_are_the_old_ones(tree):
    save(grey(9), tree.home/'B.JPEG', format='JPEG')
    names = {'folder': ['a.png', 'B.JPEG'], 'imagenet': ['train/n01/a.png', 'train/n01/B.JPEG', 'train/n02/b.png'],
             'tinyimagenet': ['train/n01/images/a.png', 'train/n01/images/B.JPEG', 'train/n02/images/b.png']}[tree.kind]
    fact = (lambda path: path.stat().st_size) if tree.kind == 'imagenet' else lambda path: sha256(path.read_bytes())
    expected = listing_sum(f'{name} {fact(tree.root/name)}' for name in names)
    assert tree.data().checksum['images' if tree.kind == 'folder' else 'train'] == expected


def test_names_that_are_no_text_can_be_summed(tree):
    name = os.fsencode(tree.home) + b'/\xff.png'
    shutil.copy(tree.home/'a.png', name)
    assert tree.greys() == [1, 1] and len(tree.data().checksum) == (1 if tree.kind == 'folder' else 2)


def test_a_cache_of_another_decoding_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setenv('CMIM_DATA', str(tmp_path/'downloads'))
    tree = Tree('tinyimagenet', tmp_path/'tree')
    monkeypatch.setattr('cmim_repro.lab.data.tinyimagenet._DECODING', 'as before')
    monkeypatch.setattr(ImageOps, 'exif_transpose', lambda image, in_place: None)
    save(Image.fromarray(ARROW), tree.home/'a.png', exif=oriented(6))
    assert np.array_equal(tree.pixels()[0], ARROW)
    monkeypatch.undo()
    monkeypatch.setenv('CMIM_DATA', str(tmp_path/'downloads'))
    assert np.array_equal(tree.pixels()[0], np.rot90(ARROW, -1))


def test_an_empty_place_is_one_sentence(tmp_path):
    with pytest.raises(Unusable, match=r'holds no images; accepted: files that end in \.jpeg, \.jpg, \.png, \.bmp, \.webp\.$'): images_in(tmp_path)
    with pytest.raises(Unusable, match='has no class folders; it must hold a folder for each class'): folders_in(tmp_path)


@pytest.mark.filterwarnings('ignore::PIL.Image.DecompressionBombWarning')
@pytest.mark.parametrize('side', [9_000, 12_000, 40_000])
def test_an_image_of_too_many_pixels_is_not_decoded(tmp_path, side):
    "A small file that claims a large image: refused from its header, whatever follows."
    def chunk(kind, content): return struct.pack('>I', len(content)) + kind + content + struct.pack('>I', zlib.crc32(kind + content))
    path = tmp_path/'bomb.png'
    path.write_bytes(b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', side, side, 8, 2, 0, 0, 0)) + chunk(b'IDAT', zlib.compress(b'')) + chunk(b'IEND', b''))
    with pytest.raises(Unusable, match='bomb.png is not a readable image .*pixels') as said: open_image(path)
    assert '\n' not in str(said.value)
