"""The names that a program of your own needs; each is imported when it is asked for. See nbs/01_commands.ipynb."""
__version__ = "0.1.0"

_WHERE = {'attack': 'attacks.core', 'defense': 'defenses.core', 'objective': 'defenses.core', 'release': 'defenses.core',
          'model': 'lab.models.core', 'dataset': 'lab.data.core', 'cmi_curve': 'theory.cmi', 'audit': 'audits.measures',
          'audit_model': 'audits.verdict',
          'CMIMLoss': 'defenses.own_training', 'Indexed': 'defenses.own_training'}
__all__ = sorted(_WHERE)


def __getattr__(name):
    if name not in _WHERE: raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    from importlib import import_module
    return getattr(import_module(f'{__name__}.{_WHERE[name]}'), name)


def __dir__(): return sorted({*globals(), *_WHERE})
