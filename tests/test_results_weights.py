"""The weights of CMIM and NT are chosen by the rules of Appendix G, on the images that the selection names."""
import math

import pandas as pd
import pytest
import torch

from cmim_repro.exhibits import table2, table5
from cmim_repro.experiments.profiles import narrowed, profile
from cmim_repro.report.exhibit import Exhibit
from cmim_repro.report.models import POWERS, candidate_lines, choosing_outputs, tuned, tuning, weight_choices
from cmim_repro.report.results import results_frame
from cmim_repro.theory.cmi import cmi_curve


def lines(defense, seed, accuracy, weight=None, cmi=math.nan, diverged=False):
    return {'data': 'digits', 'teacher': 'a', 'defense': defense, 'choice': '' if weight is None else f'weight={weight:g}', 'seed': seed,
            'weight': weight, 'accuracy': math.nan if diverged else accuracy, 'cmi': cmi, 'diverged': diverged}


def picked(*rows):
    "The chosen weight of each method, and why."
    found = weight_choices(pd.DataFrame(rows))
    kept = found[found['chosen'] != '']
    return {m: (w, why) for m, w, why in zip(kept['defense'], kept['weight'], kept['chosen'], strict=True)}


CE = [lines('ce', seed, 90. + seed) for seed in range(3)]


def seeds(method, weight, gain, cmi, n=3): return [lines(method, seed, 90. + seed + gain, weight, cmi) for seed in range(n)]


def test_least_cmi_among_those_that_keep_accuracy():
    assert picked(*CE, *seeds('cmim', .1, 3., .9), *seeds('cmim', .5, 0., .4), *seeds('cmim', 1., -.01, .1)) == {'cmim': (.5, 'by the rule')}


def test_largest_weight_that_costs_less_than_half_a_point():
    assert picked(*CE, *seeds('nt', .01, -.49, 1.), *seeds('nt', .05, -.5, .1), *seeds('nt', .001, 2., 1.)) == {'nt': (.01, 'by the rule')}


def test_when_none_keeps_to_its_rule_the_most_accurate_is_taken_and_it_is_said():
    found = picked(*CE, *seeds('cmim', .1, -1., .9), *seeds('cmim', 1., -2., .1), *seeds('nt', .1, -1., 1.), *seeds('nt', .2, -.9, 1.))
    assert found == {'cmim': (.1, 'the most accurate: none keeps to the rule'), 'nt': (.2, 'the most accurate: none keeps to the rule')}


def test_the_same_seeds_are_compared():
    "The candidate's only seed is the one with which cross-entropy is worst, so over all seeds it would seem to lose."
    assert picked(*CE, *seeds('cmim', .1, -1., .1), lines('cmim', 0, 90.5, .5, .2)) == {'cmim': (.5, 'by the rule')}


def test_a_candidate_that_diverged_is_none():
    assert picked(*CE, *seeds('cmim', .1, 1., .9), *seeds('cmim', 1., 1., .1, n=2), lines('cmim', 2, 0., 1., diverged=True)) == {'cmim': (.1, 'by the rule')}


@pytest.mark.parametrize('missing', [[], [lines('ce', 7, 90.)], [lines('ce', 0, 90., diverged=True)]])
def test_without_cross_entropy_nothing_is_chosen_by_the_rule(missing):
    assert picked(*missing, *seeds('cmim', .1, 1., .9), *seeds('cmim', 1., 1., .1)) == {}


@pytest.mark.parametrize('selection', ['clean', 'paper'])
def test_table_5_chooses_by_the_rule(selection, tmp_path, monkeypatch):
    "A real run in smoke: three weights, of which the table shows one, chosen on the images that the selection names."
    asked = {'profile': 'smoke', 'store': str(tmp_path/'store'), 'figures': str(tmp_path/'out'), 'networks': 'cnn_tiny', 'weights': '.1 1 30', 'seeds': 2}
    exhibit, seen = Exhibit('table5', {**asked, 'selection': selection, 'workers': 1}), []
    monkeypatch.setattr('cmim_repro.report.exhibit.display', lambda *items, **_: seen.extend(items))
    exhibit.run(table5.entries)
    exhibit.show(table5.draw)
    models = [e for e in exhibit.entries if e.column == 'model']
    def measured(e):
        split = 'held_out' if selection == 'clean' else 'test'
        outputs, labels = exhibit.store.log_probs(e.run, split)
        assert torch.equal(choosing_outputs(e.run, exhibit.store, selection)[1], labels)
        return (outputs.argmax(1) == labels).double().mean().item(), cmi_curve(outputs.double(), labels, POWERS).max().item()
    means = {}
    for e in models: means.setdefault(e.choice, []).append(measured(e))
    means = {choice: torch.tensor(values, dtype=torch.float64).mean(0).tolist() for choice, values in means.items()}
    ce = means.pop('')
    sound = {choice: v for choice, v in means.items() if v[0] >= ce[0] - 1e-12}
    wanted = min(sound, key=lambda c: sound[c][1]) if sound else max(means, key=lambda c: means[c][0])
    assert set(exhibit.picked.query("defense == 'cmim'")['choice']) == {wanted}
    shown = exhibit.give(tuning)
    assert shown.loc[shown['chosen'] != '', 'choice'].tolist() == [wanted]


def test_nt_may_be_tuned_in_table_2_and_without_candidates_nothing_changes(tmp_path):
    smoke = narrowed(profile('smoke'), seeds=1)
    plain, asked = table2.entries(smoke), table2.entries(smoke, weights='nt=.001 .01, cmim=.5')
    assert {e.choice for e in asked if e.defense == 'nt'} == {'weight=0.001', 'weight=0.01'}
    assert {e.run.id for e in plain if e.defense not in ('nt', 'cmim')} <= {e.run.id for e in asked}
    exhibit = Exhibit('table2', {'profile': 'smoke', 'store': str(tmp_path)})
    frame = results_frame(plain, exhibit.store)
    assert tuned(frame, plain, exhibit.store) is not frame and tuned(frame, plain, exhibit.store).equals(frame)
    assert candidate_lines(plain, exhibit.store).empty


def test_where_nothing_is_held_out_every_other_test_image_chooses():
    class Kept:
        data_options = {}
        def log_probs(self, run, split):
            assert split == 'test'
            return torch.arange(10.).view(5, 2).log_softmax(1), torch.arange(5)

    assert choosing_outputs(Kept(), Kept(), 'clean')[1].tolist() == [0, 2, 4]
    assert choosing_outputs(Kept(), Kept(), 'paper')[1].tolist() == [0, 1, 2, 3, 4]
