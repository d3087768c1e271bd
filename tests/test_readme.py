"""What the README shows is what the committed results hold, and the commands it names exist."""
import json
import re
from pathlib import Path

import pandas as pd
import pytest
import torch

from cmim_repro.defenses.ce import digit_network, digit_split
from cmim_repro.defenses.core import objective
from cmim_repro.defenses.ls import EPSILONS
from cmim_repro.experiments.profiles import narrowed, profile
from cmim_repro.experiments.tasks import SMALL_OPTIONS
from cmim_repro.report.exhibit import NARROWING, declared, notebook_of, read_value
from cmim_repro.report.paper import paper_setting
from cmim_repro.report.results import verdicts
from cmim_repro.report.statistics import t_interval

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT/'README.md').read_text()


NOTEBOOK = '\n'.join(''.join(cell['source']) for cell in json.loads((ROOT/'nbs'/'run_table1.ipynb').read_text())['cells'] if cell['cell_type'] == 'markdown')
SHOWN = [(text, name) for text in (README, NOTEBOOK) for name in re.findall(r'<!-- (\S+\.md) -->', text)]


@pytest.mark.parametrize('text, name', SHOWN, ids=[name for _, name in SHOWN])
def test_tables_are_the_committed_ones(text, name):
    "Word by word: prose is wrapped at another width here and there."
    shown = text.split(f'<!-- {name} -->')[1].split('<!-- end -->')[0]
    assert shown.split() == (ROOT/name).read_text().split()


def test_the_committed_verdicts_follow_from_the_committed_runs():
    folder = ROOT/'data'/'results'/'short'
    runs = pd.read_csv(folder/'table1_runs.csv').fillna({'choice': '', 'student': ''})
    committed = pd.read_csv(folder/'verdicts.csv', dtype=str, keep_default_na=False)
    pd.testing.assert_frame_equal(committed, verdicts(runs).astype(str))


def test_the_snippet_runs_and_trains():
    "With names that stand for what the reader has: a model, an optimizer, batches."
    images, labels, _, _ = digit_split()
    model = digit_network()
    places = torch.arange(len(images)).split(100)
    given = {'epochs': 3, 'model': model, 'optimizer': torch.optim.SGD(model.parameters(), .2, momentum=.9), 'train_labels': labels,
             'batches': [(images[part], labels[part], part) for part in places], 'labels': labels, 'log_probs': torch.randn(len(labels), 10).log_softmax(1),
             'student_logits': torch.randn(100, 10), 'teacher_log_probs': torch.randn(100, 10).log_softmax(1)}
    [snippet] = re.findall(r'```python\n(.*?)```', README, re.S)
    exec(snippet, given)
    assert (model(images).argmax(1) == labels).double().mean() > .8


def test_there_is_a_table(): assert SHOWN


TEXTS = [README, *(path.read_text() for path in sorted((ROOT/'data'/'results').glob('*.md')))]
GIVEN = {(name, value.strip('"').rstrip(':;.,')) for text in TEXTS for name, value in re.findall(r'-p (\w+) ("[^"]*"|[^\s`]+)', text)}


@pytest.mark.parametrize('name, value', sorted(GIVEN))
def test_parameters_are_taken_as_the_texts_give_them(name, value):
    defaults = {**declared(notebook_of('table10')), **declared(notebook_of('audit')), **declared(notebook_of('table1'))}
    read = read_value(name, value, defaults[name])
    if name == 'networks' or value in ('folder', 'image_size=32'): return # other networks, images of the reader's own
    if name in NARROWING: narrowed(profile('mini'), **{name: read})


def test_make_targets_exist():
    makefile = (ROOT/'Makefile').read_text()
    for target in re.findall(r'`?make ([a-z][a-z0-9-]*)', README): assert re.search(rf'^{target}:', makefile, re.M), target


@pytest.mark.parametrize('path', ['README.md', 'data/results/README.md', 'data/results/REPORT.md'])
def test_links_lead_somewhere(path):
    for target in re.findall(r'\]\(([^)#]+)\)', (ROOT/path).read_text()): assert ((ROOT/path).parent/target).exists(), target


SHORT = ROOT/'data'/'results'/'short'


def measured():
    "Sentences, or parts of them, that both texts must hold, with numbers from the committed files."
    cmi = pd.read_csv(SHORT/'cmi.csv').set_index(['defense', 'alpha'])['mean']
    for defense in ('cmim', 'ce'): yield ' / '.join(f'{cmi[defense, alpha]:.3f}' for alpha in (.25, .5, 1.))
    below = [alpha for alpha in (.25, .5, 1.) if max(cmi['mad', alpha], cmi['rsp', alpha]) < cmi['cmim', alpha]]
    yield f"MAD's and RSP's CMI lie below CMIM's at alpha = {', '.join(f'{a:g}' for a in below[:-1])} and {below[-1]:g}"
    curves = pd.read_csv(SHORT/'figure1.csv')
    peaks = curves.loc[curves.groupby(['seed', 'class'])['cmi'].idxmax(), 'alpha']
    assert peaks.nunique() == 1
    yield f"Figure 1's claim fails: {peaks.between(.25, .75).sum()} of {len(peaks)} maxima lie between 0.25 and 0.75"
    yield f'all are at the end of the range, at {peaks.max():g}'
    gains = pd.read_csv(SHORT/'table5.csv').query("column == 'gain'").set_index('Model')['mean']
    yield f"On cnn_small CMIM is {-gains['cnn_small']:.2f} point below cross-entropy (Table 5)"


def judged():
    "The same of the rows of Table 1."
    found = pd.read_csv(SHORT/'verdicts.csv').set_index('defense')
    assert found.index[found['paper rule'] == 'undistillable'].tolist() == ['mad', 'apgp']
    assert (found['verdict'] == 'undecided').all() and len(found) == 9
    yield from ('CMIM is *distillable* here', 'MAD and APGP are *undistillable*', 'nine', '*undecided*')
    seeds = found['seeds to decide']
    assert seeds.min() == seeds['ls'] and seeds.max() > 1000
    yield f"from {seeds['ls']} (LS) and {seeds['ce']} (CE) to {seeds['cmim']} (CMIM) and thousands"


def compared():
    "The same of single runs, and of what was chosen."
    runs = pd.read_csv(SHORT/'table1_runs.csv')
    models = runs[runs['column'] == 'model'].drop_duplicates(['defense', 'seed']).pivot(index='seed', columns='defense', values='last')
    assert models.mean().idxmax() == 'cmim'
    low, high = t_interval((models['cmim'] - models['ls']).to_numpy())
    yield f'ighest accuracy" has a paired 95 % interval from {low:.2f} to +{high:.2f} points against LS'
    picked = runs[runs['chosen_clean'] & (runs['defense'] == 'ce')].groupby('column')['last'].mean()
    yield f"Knockoff ends {picked['ls'] - picked['knockoff']:.2f} points below label smoothing with the *undefended* teacher too"
    [edge] = set(runs.loc[runs['chosen_clean'] & (runs['column'] == 'ls'), 'choice'])
    assert edge == f'epsilon={min(EPSILONS)}'
    yield f'The label smoothing that was chosen, {min(EPSILONS)}, is the lower edge of its grid'
    grid, weight = paper_setting('grid'), SMALL_OPTIONS['cmim']['*']['weight']
    assert weight > max(grid) and objective.options('cmim')['centroids'] == 'memory'
    yield f"CMIM's lambda is {weight:g}, outside the paper's grid of {min(grid):g} to {max(grid):g}, and no rival was tuned"
    yield from ('There is no augmentation', "Centroids are the memory's, not Algorithm 1's")


def test_the_readme_says_of_the_short_training_what_its_verdicts_say():
    verdicts = set(pd.read_csv(SHORT/'verdicts.csv')['verdict'])
    assert ('All nine rows of its Table 1 are *undecided*' in README) == (verdicts == {'undecided'}) and 'data/results/short' in README


@pytest.mark.parametrize('facts', [measured, judged, compared])
def test_what_agrees_and_what_does_not_is_what_the_committed_files_hold(facts):
    text = ' '.join((ROOT/'data'/'results'/'README.md').read_text().split())
    assert [fact for fact in facts() if fact not in text] == []


def test_how_often_pairing_helps():
    runs = pd.read_csv(SHORT/'table1_runs.csv').query("chosen_clean and column != 'model'")
    table = runs.pivot(index='seed', columns=['defense', 'column'], values='last')
    cells = [(table[cell], table[cell[0], 'ls']) for cell in table.columns if cell[1] != 'ls']
    less = sum((student - ls).std() < min(student.std(), ls.std()) for student, ls in cells)
    said = f'varies less than either in {less} of {len(cells)} cells'
    notebook = '\n'.join(''.join(cell['source']) for cell in json.loads((ROOT/'nbs'/'report'/'02_statistics.ipynb').read_text())['cells'])
    for text in ((ROOT/'data'/'results'/'README.md').read_text(), notebook): assert said in ' '.join(text.split())


GPU = ROOT/'data'/'results'/'gpu'


def timed():
    "What the README says of speed on a GPU."
    table = pd.read_csv(GPU/'throughput.csv')
    one = table[table['students'] == 1].set_index(['network', 'method', 'mode'])
    networks = {'resnet18': 'ResNet-18', 'vgg16': 'VGG-16', 'resnet50': 'ResNet-50'}
    rows = {f'{label}, {method.upper()}': (name, method) for name, label in networks.items() for method in ('ce', 'cmim')}
    rows |= {'KD, VGG-16 to VGG-11': ('vgg11', 'kd'), 'KD, ResNet-50 to ResNet-18': ('resnet18', 'kd')}
    for label, key in rows.items():
        found = [one['step (ms)'].get((*key, mode)) for mode in ('captured', 'eager', 'compiled', 'compiled+captured', 'textbook')]
        yield '| ' + label + ''.join(' | ' + ('' if ms is None else f'{ms:.2f}') for ms in found).replace('|  |', '| |').replace('|  |', '| |').rstrip() + ' |'
    times = {mode: [one.loc[(*key, mode), 'step (ms)'] for key in (('vgg11', 'kd'), ('resnet18', 'kd'))] for mode in ('captured', 'textbook')}
    yield 'it is {:.1f} and {:.1f} times as fast'.format(*(slow/fast for fast, slow in zip(*times.values(), strict=True)))
    yield 'CMIM costs {:.2f}, {:.2f} and {:.2f} of CE'.format(*(one.loc[(name, 'cmim', 'captured'), 'time over CE'] for name in networks))
    yield f"runs at {one.loc[('resnet50', 'ce', 'captured'), 'share of peak']:.0%}".replace('%', ' %')
    [epoch] = table[(table['students'] == 8) & (table['images'] == 50_000)]['epoch (s)']
    yield f'take {epoch:.2f} s for an epoch of 50,000 images'


def test_speed_on_a_gpu_is_what_was_measured():
    text = ' '.join(README.split())
    assert [fact for fact in timed() if fact not in text] == []


def test_the_piece_of_table_1_is_what_was_found():
    runs = pd.read_csv(GPU/'results.csv')
    alone = runs[(runs['method'] == 'ls') & (runs['model'] == 'vgg11')]
    best = alone.loc[alone['held_out_accuracy'].idxmax()]
    models = runs[runs['model'] == 'vgg16'].set_index(['method', 'options'])['accuracy']
    weights = {json.loads(options).get('weight'): f'{value:.2%}'.replace('%', ' %') for (_, options), value in models.items()}
    facts = [f"cross-entropy ends at {weights[None]}", f"{best['accuracy']:.2%}".replace('%', ' %')]
    for text in (README, (ROOT/'data'/'results'/'README.md').read_text()): assert [fact for fact in facts if fact not in ' '.join(text.split())] == []
    text = ' '.join((ROOT/'data'/'results'/'README.md').read_text().split())
    epsilon = json.loads(best['options'])['epsilon']
    assert f"lambda 0.5 at {weights[.5]} and with 8 at {weights[8]}, while the VGG-11 with the label smoothing that held-out images choose, {epsilon}, ends" in text
    metrics = pd.read_csv(GPU/'metrics.csv').set_index(['run', 'epoch'])
    [chosen] = alone[alone['options'] == '{"epsilon":0.8}']['run']
    assert f"loss of {metrics.loc[(chosen, 1), 'train_loss']:.3f} nats on the GPU" in text


QUICK = ROOT/'data'/'results'/'quick'
ROWS = ['ce', 'mad', 'apgp', 'rsp', 'nt', 'snt', 'st', 'ls', 'cmim']
DOSE = ['ce', 'cmim:weight=0.5', 'cmim', 'cmim:weight=8']
SETS = {'0 to 3': QUICK, '30 to 33': QUICK/'30_to_33', '40 to 43': QUICK/'40_to_43'}


def verdicts_in(folder, attacks='as printed'):
    "The committed verdicts, a row a defence."
    found = pd.read_csv(folder/'verdicts.csv')
    return found[found['attacks'] == attacks].set_index('defense')


def gains_in(folder):
    "Mean gains over the LS student in points: rows are defences, columns attacks."
    runs = pd.read_csv(folder/'table1_runs.csv')
    picked = runs[runs['chosen_clean'] & (runs['column'] != 'model')].pivot_table(index='defense', columns='column', values='last')
    return picked.drop(columns='ls').sub(picked['ls'], axis=0)


def quick_facts():
    "What the README says of quick: sentences, or parts of them."
    found, gains = verdicts_in(QUICK), gains_in(QUICK)
    ce = found.loc['ce']
    assert (ce['verdict'], ce['knowledge']) == ('distillable', 'distillable')
    yield f"The undefended teacher is {told(ce['verdict'], ce['why'])}, and against the null arms by {told(ce['knowledge'], ce['knowledge: why']).split(' by ')[1]}"
    assert gains.loc['ce'].idxmax() == 'dkd' and gains.loc['centroid', 'dkd'] > gains.loc['ce', 'dkd']/2
    yield f"DKD gains most, {gains.loc['ce', 'dkd']:.2f} points, but {gains.loc['centroid', 'dkd']:.2f} of them"
    best = [gains.loc[row].max() for row in DOSE[1:]]
    yield 'The best attack gains {:.2f}, {:.2f} and {:.2f} points with a weight of 0.5, 2 and 8'.format(*best)
    weights = pd.read_csv(QUICK/'weights.csv').set_index('weight')['chosen'].fillna('')
    assert weights.to_dict() == {.5: '', 2.: 'by the rule', 8.: ''}
    yield 'its rule (Appendix G: the least CMI that keeps the accuracy) takes 2'
    assert best[-1] == gains.loc['cmim:weight=8', 'dkd'] < gains.loc['centroid', 'dkd'] and best[1] == gains.loc['cmim', 'dkd'] > 0
    yield f"undistillable by the paper's rule ({gains.loc['cmim', 'kd']:.2f} points)"
    cmi = pd.read_csv(QUICK/'cmi.csv').set_index(['defense', 'alpha'])['mean']
    yield f"where CMI at alpha = 1 is {cmi['cmim:weight=8', 1.]:.3f} nats instead of {cmi['ce', 1.]:.3f}"
    verdict = found.loc[ROWS, 'verdict']
    assert verdict.index[verdict != 'undecided'].tolist() == ['ce', 'nt', 'snt', 'st', 'ls', 'cmim'] and not (found['verdict'] == 'undistillable').any()
    yield 'Six of the nine rows of Table 1 are decided (CE, NT, SNT†, ST, LS, CMIM), all *distillable*. None is *undistillable*.'


def knowledge_facts():
    "How often it is open whether CMIM's answers teach more than null arms."
    found = [verdicts_in(folder)['knowledge'] for folder in SETS.values()]
    assert [sum(each[row] == 'undecided' for each in found) for row in ('cmim', 'cmim:weight=8')] == [2, 3]
    yield 'in two of the three sets it stays open whether a thief gains any knowledge of the image from CMIM with a weight of 2, and in all three with 8'


def told(verdict, why):
    "A verdict with the attack that decided it."
    return '{} by {}, {} points (p {})'.format(verdict, *re.match(r'(.+) gains (\S+) points .* p (\S+)\.', why).groups()) if verdict == 'distillable' else verdict


def set_rows():
    "Lines of the README's table on three sets of seeds."
    for seeds, folder in SETS.items():
        found, best = verdicts_in(folder), gains_in(folder).max(axis=1)
        chosen = pd.read_csv(folder/'weights.csv').dropna(subset='chosen')
        [rule] = [f"{w:g}" + ('' if why == 'by the rule' else ' (none keeps to it)') for w, why in zip(chosen['weight'], chosen['chosen'], strict=True)]
        ce, decided = found.loc['ce'], (found.loc[ROWS, 'verdict'] != 'undecided').sum()
        dose = ' / '.join(f'{best[row]:+.2f}' for row in (*DOSE, 'centroid'))
        yield f"| {seeds} | {told(ce['verdict'], ce['why'])} | {told(ce['knowledge'], ce['knowledge: why'])} | {decided} of 9 | {dose} | {rule} |"


def supports():
    "What the report counts for the paper."
    cmi = pd.read_csv(QUICK/'cmi.csv').set_index(['defense', 'alpha'])['mean']
    accuracy = pd.read_csv(QUICK/'models.csv').set_index('column')['mean']
    yield ('at alpha = 1 {:.3f} nats with cross-entropy, {:.3f}, {:.3f} and {:.3f} with weights of 0.5, 2 and 8'
           .format(*(cmi[row, 1.] for row in DOSE)))
    yield 'at accuracies of {:.1f}, {:.1f}, {:.1f} and {:.1f} %'.format(*(accuracy[row] for row in DOSE))
    lost = gains_in(QUICK).loc['cmim'].loc[lambda gain: gain < -.5].sort_values()
    assert set(lost.index) == {'kd', 'mkd', 'avg'}
    yield f'MKD, AVG and KD end {-lost.max():.1f} to {-lost.min():.1f} points below LS'
    others = [row for row in ROWS if row not in ('ce', 'cmim')]
    found = {seeds: verdicts_in(folder).loc[others, 'verdict'] for seeds, folder in SETS.items()}
    assert not any((verdict == 'undistillable').any() for verdict in found.values())
    yield ', '.join(f'{(verdict == "distillable").sum()} of {len(others)} with seeds {seeds}' for seeds, verdict in found.items())


def opposes():
    "What it counts against the paper."
    found = {seeds: verdicts_in(folder) for seeds, folder in SETS.items()}
    for row in ('cmim', 'cmim:weight=8'): yield f"it is {told(*found['0 to 3'].loc[row, ['verdict', 'why']])}"
    assert all((each.loc[['cmim', 'cmim:weight=8'], 'verdict'] == 'distillable').all() for each in found.values())
    yield 'So it is, with both weights, in the two other sets of seeds'
    assert all(each.loc['ce', 'knowledge'] == 'distillable' != each.loc['cmim:weight=8', 'knowledge'] for each in found.values())
    yield 'Against the null arms the undefended teacher is distillable in all three sets of seeds; CMIM with a weight of 8 in none'
    [maxima] = [fact.partition(': ')[2] for fact in measured() if 'maxima lie' in fact]
    yield f'{maxima} in `short/`'
    alone = pd.concat([pd.read_csv(folder/'table1_runs.csv').query("chosen_clean and defense == 'ce' and column == 'ls'") for folder in SETS.values()])
    yield f'Twelve students with label smoothing spread by {alone["last"].std():.2f} points (standard deviation)'
    gain = gains_in(QUICK)['dkd']
    yield f"of {gain['ce']:.2f} points from cross-entropy {gain['centroid']:.2f} come from class centroids too"
    ranks = pd.read_csv(QUICK/'beyond2_ranks.csv').query("`gain of` == 'Best tuned'").set_index('known')
    for known in ('CMI, training images', 'CMI, test images'): assert ranks.loc[known, 'reading'] == 'undecided'
    assert ranks.loc['CMI, as predicted', 'reading'] == 'higher'
    said = {known: f"{found['rho']:+.2f} (95 % interval {found['low']:+.2f} to {found['high']:+.2f})" for known, found in ranks.iterrows()}
    yield f"rho {said['CMI, training images']} on training images"
    yield f"{said['CMI, test images']} on test images"
    yield f"CMI given the *predicted* class {said['CMI, as predicted']}"


def tuned_facts():
    "What tuned attacks gain."
    gains, found = gains_in(QUICK/'tuned'), verdicts_in(QUICK/'tuned', 'tuned')
    best = gains[[c for c in gains if c.endswith(' tuned')]].max(axis=1)
    yield ('{:.2f} points from cross-entropy, {:.2f}, {:.2f} and {:.2f} from CMIM with weights of 0.5, 2 and 8, and {:.2f} from class centroids'
           .format(*best[[*DOSE, 'centroid']]))
    yield ('KD ends {:.1f} points below LS as printed and {:+.1f} tuned on MAD, {:.1f} and {:+.1f} on RSP, {:.1f} and {:+.1f} on CMIM with a weight of 2'
           .format(*(sign*gains.loc[row, column] for row in ('mad', 'rsp', 'cmim') for column, sign in (('kd', -1), ('kd tuned', 1)))))
    assert (found.loc[ROWS, 'verdict'] == 'distillable').all()
    yield 'All nine rows are decided, all *distillable*'
    assert found.index[found['knowledge'] == 'undistillable'].tolist() == ['mad']
    yield 'MAD is *undistillable* there: no tuned attack learns from it what null arms do not give'
    knows = found.loc[['cmim', 'cmim:weight=8'], ['knowledge', 'knowledge: why']].agg(lambda row: told(*row), axis=1)
    yield 'Against tuned null arms CMIM with a weight of 2 is {}, and with 8 {}'.format(*knows)


def mixed_facts():
    "What the README says of Beyond 1."
    found = pd.read_csv(QUICK/'beyond1.csv').set_index(['Own share', 'column'])
    cmi = {share: float(found.loc[(share, 'as predicted'), 'text']) for share in (1., .01)}
    yield f'of 0.01 is the network\'s own and the rest the class centroid have a CMI, given the predicted class, of {cmi[.01]:.2g} nats instead of {cmi[1.]:.2g}'
    means = found['mean']
    yield f"KD's gain falls from {means[1., 'kd']:.2f} to {means[.01, 'kd']:.2f} points; a thief who undoes the mixing keeps {means[.01, 'unmixed']:.2f}"


def test_what_quick_says_is_what_the_committed_files_hold():
    text = ' '.join(README.split())
    assert [fact for fact in (*quick_facts(), *set_rows(), *knowledge_facts(), *tuned_facts(), *mixed_facts()) if fact not in text] == []


@pytest.mark.parametrize('facts', [supports, opposes, tuned_facts, mixed_facts])
def test_the_report_says_what_the_committed_files_hold(facts):
    text = ' '.join((ROOT/'data'/'results'/'REPORT.md').read_text().split())
    assert [fact for fact in facts() if fact not in text] == []


MINI = ROOT/'data'/'results'/'mini'
MINI_ROWS = {'ce': 'CE', 'ls': 'LS', 'cmim:weight=0.5': 'CMIM, weight 0.5', 'cmim': 'CMIM, weight 2', 'top1': 'Top-1'}


def mini_rows():
    "Lines of the README's table on CIFAR-100."
    accuracy = pd.read_csv(MINI/'models.csv').set_index('column')['mean']
    printed, tuned = (verdicts_in(MINI, attacks) for attacks in ('as printed', 'tuned'))
    for row, label in MINI_ROWS.items():
        said = [told(found.loc[row, verdict], found.loc[row, why]) for verdict, why in (('verdict', 'why'), ('knowledge', 'knowledge: why'))
                for found in (printed, tuned)]
        yield f'| {label} | {accuracy[row]:.1f} | ' + ' | '.join(said) + ' |'


def mini_facts():
    "What README and report say of CIFAR-100."
    found = verdicts_in(MINI)
    assert (found.loc['ce', ['verdict', 'knowledge']] == 'distillable').all()
    printed, knows = (told(*found.loc['ce', [verdict, why]]) for verdict, why in (('verdict', 'why'), ('knowledge', 'knowledge: why')))
    yield f"The undefended teacher is {printed}, and against the null arms by {knows.split(' by ')[1]}"
    gains = gains_in(MINI)
    tuned = gains[[c for c in gains if c.endswith(' tuned')]].max(axis=1)
    yield ('The best tuned attack gains {:.1f} points from cross-entropy, {:.1f} and {:.1f} from CMIM with weights of 0.5 and 2, '
           '{:.1f} from the top-1 alone and {:.1f} from class centroids'
           .format(*tuned[['ce', 'cmim:weight=0.5', 'cmim', 'top1', 'centroid']]))
    yield 'KD, MKD and AVG end {:.1f}, {:.1f} and {:.1f} points below LS'.format(*-gains.loc['cmim', ['kd', 'mkd', 'avg']])
    accuracy = pd.read_csv(MINI/'models.csv').set_index('column')['mean']
    yield 'costs {:.1f} and {:.1f} points of accuracy'.format(*(accuracy['ce'] - accuracy[row] for row in ('cmim:weight=0.5', 'cmim')))


def mini_intervals():
    "Gains over the LS student with their intervals over seeds."
    runs = pd.read_csv(MINI/'table1_runs.csv').query("chosen_clean and column != 'model'")
    table = runs.pivot(index='seed', columns=['defense', 'column'], values='last')
    for defense, column in (('ce', 'dkd'), ('cmim', 'dist tuned'), ('cmim', 'kd'), ('top1', 'dkd tuned')):
        gain = table[defense, column] - table[defense, 'ls']
        assert len(gain) == 6
        yield '{:+.2f} ({:+.2f} to {:+.2f})'.format(gain.mean(), *t_interval(gain.to_numpy()))


def mini_lengths():
    "What other numbers of epochs change for the students of the undefended teacher."
    def means(folder):
        found = pd.read_csv(folder/'table1_runs.csv').query("chosen_clean and defense == 'ce' and seed < 3")
        return found.groupby('column')['last'].mean()[['ls', 'kd', 'dkd']]
    found = {epochs: means(folder) for epochs, folder in {20: MINI/'half', 40: MINI, 80: MINI/'twice'}.items()}
    for epochs, row in found.items(): yield f'| {epochs} | ' + ' | '.join(f'{value:.1f}' for value in row) + ' |'
    assert found[20]['ls'] > found[40]['ls'] > found[80]['ls'] and found[20]['kd'] > found[20]['ls']
    yield f"with 20 epochs it is {found[20]['ls'] - found[40]['ls']:.1f} points better than with the 40 of the table"
    tuned = gains_in(MINI).filter(like=' tuned').max(axis=1)[list(MINI_ROWS)]
    assert tuned.min() > found[20]['ls'] - found[40]['ls']
    yield 'the best tuned attack on each of the five teachers gains more'
    best = {name: max(row[name] for row in found.values()) for name in ('ls', 'kd', 'dkd')}
    yield f"each at its best length, KD gains {best['kd'] - best['ls']:.1f} and DKD {best['dkd'] - best['ls']:.1f} points"


def test_what_mini_says_is_what_the_committed_files_hold():
    text = ' '.join(README.split())
    assert [fact for fact in (*mini_rows(), *mini_facts(), *mini_intervals(), *mini_lengths()) if fact not in text] == []
    report = ' '.join((ROOT/'data'/'results'/'REPORT.md').read_text().split())
    assert [fact for fact in mini_facts() if fact not in report] == []


def cost_rows():
    "Lines of the README's table of an earlier revision and this one."
    for _, row in pd.read_csv(ROOT/'data'/'results'/'then_and_now.csv').iterrows():
        yield f"| {row['what']} | {row['then']:.3g} | {row['now']:.3g} | {row['now/then']:.2f} ({row['lowest']:.2f} to {row['highest']:.2f}) |"
    now = pd.read_csv(ROOT/'data'/'results'/'then_and_now.csv').set_index('what')['now']
    yield f"With a single power it costs {now['step of cnn_small with CMIM, N = 1, over cross-entropy']:.2f} already"


def half_facts():
    "What bf16 does to accuracies in mini."
    cells = [pd.read_csv(folder/'table1_runs.csv').query("defense == 'ce' and seed < 3") for folder in (MINI, MINI/'bf16')]
    both = cells[0].merge(cells[1], on=['column', 'choice', 'seed'])
    both['change'] = both['last_y'] - both['last_x']
    found = both[both['column'].isin(['model', 'ls', 'kd'])].groupby('column')['change'].agg(['mean', 'std', 'count'])
    assert found['count'].to_dict() == {'model': 3, 'ls': 33, 'kd': 3}
    yield 'three teachers by {:+.2f} points, 33 LS students by {:+.2f} and three KD students by {:+.2f} (standard deviations {:.1f}, {:.1f} and {:.1f})'.format(
        *(found.loc[name, what] for what in ('mean', 'std') for name in ('model', 'ls', 'kd')))


def test_what_the_readme_says_of_speed_on_a_cpu_was_measured():
    text = ' '.join(README.split())
    assert [fact for fact in (*cost_rows(), *half_facts()) if fact not in text] == []


@pytest.mark.parametrize('folder', [*SETS.values(), QUICK/'tuned', MINI], ids=[*SETS, 'tuned', 'mini'])
def test_the_verdicts_of_quick_follow_from_its_runs(folder):
    runs = pd.read_csv(folder/'table1_runs.csv').fillna({'choice': '', 'student': ''})
    committed = pd.read_csv(folder/'verdicts.csv', dtype=str, keep_default_na=False)
    pd.testing.assert_frame_equal(committed, verdicts(runs).astype(str))
