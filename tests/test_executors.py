"""A plan gives the same weights wherever it runs, survives a worker that dies, and says in a sentence what is wrong."""
import contextlib
import os
import platform
import signal
import stat
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from cmim_repro.core import Invalid, Unusable
from cmim_repro.experiments.execution import OpenRuns, Patience, execute, read_settings
from cmim_repro.experiments.runs import Plan, make_run
from cmim_repro.experiments.store import Store
from cmim_repro.experiments.workers import (
    _plan_file,
    _Settled,
    compute,
    execute_on_dask,
    local_client,
    parts_of,
    read_executor,
    remote_client,
    run_children,
    slurm_cluster,
    torchrun_command,
    worker_options,
)
from cmim_repro.lab.processes import join_processes, processes
from cmim_repro.lab.training import Recipe, Settings

CPU = Settings(device='cpu', checkpoint_seconds=0)
EPOCHS = 8
COMMON = {'recipe': Recipe(epochs=EPOCHS, batch_size=32, lr=.05, schedule='cosine'), 'data_options': {'per_class': 40}}
TEACHERS = [make_run('digits', 'cnn_small', method, **COMMON) for method in ('cmim', 'ce')]
RELEASED = make_run('digits', 'cnn_small', 'st', teacher=TEACHERS[1], **COMMON)
PLAN = Plan.of([make_run('digits', 'cnn_tiny', method, teacher=teacher, **COMMON)
                for method, teacher in (('kd', TEACHERS[0]), ('mkd', TEACHERS[0]), ('kd', RELEASED))])


def finished_files(store, run):
    names = ('metrics.jsonl', 'weights.safetensors', *(['log_probs.safetensors'] if run.kind != 'attack' else []))
    return {name: (store.folder(run)/name).read_bytes() for name in names if run.kind != 'release'
            or name == 'log_probs.safetensors'}


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    store = Store(tmp_path_factory.mktemp('undisturbed'))
    assert execute(PLAN, store, CPU) == []
    return {run.id: finished_files(store, run) for run in PLAN.runs}


@pytest.fixture(scope='module')
def client():
    with local_client(2, CPU) as client: yield client


def test_a_cluster_gives_the_same_bytes(undisturbed, client, tmp_path):
    store, seen = Store(tmp_path), []
    assert execute_on_dask(PLAN, store, client, CPU, progress=lambda *said: seen.append(said), limit=2, pause=.2) == []
    for run in PLAN.runs: assert finished_files(store, run) == undisturbed[run.id], run.name
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen) and seen[-1] == (len(PLAN.runs),
                                                                                                 len(PLAN.runs), 'done')
    assert seen[0][2].endswith('2 workers')


def test_a_worker_killed_in_the_middle_is_survived(undisturbed, client, tmp_path):
    store, killed, until = Store(tmp_path/'store'), [], time.monotonic() + 300
    student, gate = next(run for run in PLAN.runs if run.kind == 'attack'), tmp_path/'closed'

    def hold(name, gate):
        "On a worker: the run called `name` waits after its second epoch as long as the gate is there."
        from cmim_repro.experiments import execution
        train = execution.train

        def gated(learners, data, seed, teacher, settings, after):
            def wait(learner):
                after(learner)
                while learner.name == name and learner.epoch == 2 and os.path.exists(gate): time.sleep(.01)
            train(learners, data, seed, teacher, settings, wait)
        execution.train = gated

    def kill(*_):
        if killed: return
        seen = len(store.metrics(student))
        assert time.monotonic() < until, f'{student.name} has {seen} epochs, and its worker was not killed'
        if seen < 2: return
        busy = [address for address, tasks in client.processing().items() if tasks]
        for address, pid in client.run(os.getpid, workers=busy).items():
            killed.append((address, len(store.metrics(student))))
            os.kill(pid, signal.SIGKILL)
        gate.unlink()

    gate.touch()
    client.run(hold, student.name, str(gate))
    assert execute_on_dask(PLAN, store, client, CPU, progress=kill, pause=.02) == []
    assert killed and all(epochs == 2 for _, epochs in killed), killed
    for run in PLAN.runs: assert finished_files(store, run) == undisturbed[run.id], run.name


class Future:
    "A task whose worker has died too often."
    status = 'error'
    def exception(self, timeout): return pytest.importorskip('distributed').KilledWorker('task', SimpleNamespace(address='tcp://10.0.0.1:1'), 3)


def test_a_task_is_submitted_anew_as_long_as_it_gets_further(tmp_path):
    store, submitted = Store(tmp_path), []
    client = SimpleNamespace(status='running', submit=lambda *given, **options: submitted.append(given) or Future())
    tasks, parts = _Settled(client, store, CPU, {}, None), parts_of(PLAN, store)
    for part in parts: tasks.submit(part)
    [first, *_], [*_, last] = parts, parts
    for written in range(1, 9): # a teacher's progress counts for its student too, whose task is lost with it
        store.start(first.cohort[0])
        (store.folder(first.cohort[0])/'checkpoint.pt').write_text('x'*written)
        os.utime(store.folder(first.cohort[0])/'checkpoint.pt', ns=(written, written))
        assert not tasks.settle(first) and len(submitted) == len(parts) + written
    student = next(part for part in parts if part.cohort[0].teacher == first.cohort[0])
    assert not tasks.settle(student) and submitted[-1][-1] is tasks.futures[first]
    for part in (first, student):
        with pytest.raises(Unusable, match=f'{part.cohort[0].name}: its worker died again and again, and nothing was gained'): tasks.settle(part)
    tasks.futures[last].status = 'cancelled' # by a scheduler that was started again
    count = len(submitted)
    assert not tasks.settle(last) and len(submitted) == count + 1


def listening(process):
    connections = psutil.Process(process).net_connections(kind='inet')
    return {connection.laddr.ip for connection in connections if connection.status == psutil.CONN_LISTEN}


def test_a_cluster_on_this_machine_listens_to_this_machine_only(client):
    workers = client.run(os.getpid)
    assert len(workers) == 2 and client.scheduler_info()['services'].keys() >= {'dashboard'}
    for process in (os.getpid(), *workers.values()): assert listening(process) == {'127.0.0.1'}


@contextlib.contextmanager
def started(*words):
    process = subprocess.Popen([sys.executable, '-m', *words], start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try: yield process
    finally:
        with contextlib.suppress(ProcessLookupError): os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_cluster_of_which_nobody_is_left_is_not_waited_for(tmp_path):
    "First its only worker is killed, then its scheduler."
    pytest.importorskip('distributed')
    file, long = tmp_path/'scheduler.json', Plan.of([make_run('digits', 'cnn_small', 'ce', recipe=Recipe(epochs=5000, batch_size=32))])
    here = '--host', '127.0.0.1', '--dashboard-address', '127.0.0.1:0'
    worker = 'distributed.cli.dask_worker', '--scheduler-file', str(file), *here, '--no-nanny', '--nthreads', '1'

    def end_of(process, patience, words):
        store, ended = Store(tmp_path/f'store-{process.pid}'), []
        def kill(*_):
            if not ended and store.metrics(long.runs[0]): ended.append(os.killpg(process.pid, signal.SIGKILL))
        with remote_client('file', str(file), timeout=3) as client, pytest.raises(Unusable, match=words) as said:
            client.wait_for_workers(1, timeout=30)
            execute_on_dask(long, store, client, CPU, progress=kill, pause=.1, patience=patience)
        assert ended and '\n' not in str(said.value)

    with started('distributed.cli.dask_scheduler', '--scheduler-file', str(file), '--port', '0', *here) as scheduler:
        until = time.monotonic() + 30
        while not file.exists(): assert time.monotonic() < until; time.sleep(.1)
        with started(*worker) as one: end_of(one, 1., 'no worker for .* minutes; start workers')
        with started(*worker): end_of(scheduler, 60., 'The Dask scheduler is gone; start it again')


def test_a_tasks_error_is_its_one_sentence(client, tmp_path):
    plan = Plan.of([make_run('cifar100', 'cnn_tiny', 'ce', recipe=Recipe(epochs=1))])
    (tmp_path/'empty').mkdir()
    with pytest.raises(Unusable, match='has no train and no test') as caught:
        execute_on_dask(plan, Store(tmp_path/'store'), client, CPU, root=tmp_path/'empty', pause=.1)
    assert '\n' not in str(caught.value) and caught.value.__cause__ is None


def test_workers_may_read_images_by_processes_of_their_own(client):
    def squares():
        from torch.utils.data import DataLoader
        return [int(x) for batch in DataLoader(range(4), num_workers=1) for x in batch]
    workers = list(client.scheduler_info()['workers'])
    assert len(workers) == 2 # each of them: one that was killed has been started anew
    for worker in workers: assert client.submit(squares, pure=False, workers=[worker]).result(60) == [0, 1, 2, 3]


def test_bf16_without_instructions_for_it_is_said_before_it_begins(tmp_path, monkeypatch):
    half = Plan.of([make_run('digits', 'cnn_tiny', 'ce', recipe=Recipe(epochs=1, precision='bf16'))])
    monkeypatch.setattr('cmim_repro.experiments.workers._multiplies_bf16', lambda: False)
    with pytest.warns(UserWarning, match='1 would train in bf16. This processor has no instructions'):
        assert compute(half, Store(tmp_path), settings=CPU) == []
    with warnings.catch_warnings(action='error'): assert compute(half, Store(tmp_path), settings=CPU) == [] # finished


@pytest.mark.parametrize('executor, words', [
    ('ray', "Unknown executor 'ray'; accepted: '' .this machine., dask"),
                                             ('torchrun:0', 'number of processes of torchrun is 0'),
    ('tcp://127.0.0.1:9', 'Dask scheduler tcp://127.0.0.1:9 cannot be reached'),
                                             ('nowhere/scheduler.json', 'scheduler file nowhere/scheduler.json is not '
                                                                        'there')])
def test_unknown_executors_get_a_sentence(tmp_path, monkeypatch, executor, words):
    monkeypatch.setattr('cmim_repro.experiments.workers.remote_client.__wrapped__.__defaults__', (1,))
    with pytest.raises(Invalid, match=words): compute(PLAN, Store(tmp_path), executor, settings=CPU)
    assert not list(tmp_path.glob('*/run.json'))


def test_without_dask_there_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'distributed', None)
    for executor in ('dask', 'tcp://127.0.0.1:9'):
        with pytest.raises(Unusable, match=r'not installed: pip install "dask\[distributed\]" dask-jobqueue'):
            compute(PLAN, Store(tmp_path), executor, settings=CPU)


def test_nothing_of_the_package_needs_dask():
    code = "import sys; sys.modules['distributed'] = sys.modules['dask'] = None; import cmim_repro.experiments.workers"
    subprocess.run([sys.executable, '-c', code], check=True)


def test_workers_get_a_gpu_each(monkeypatch):
    monkeypatch.setattr('torch.cuda.is_available', lambda: True)
    monkeypatch.setattr('torch.cuda.device_count', lambda: 4)
    def visible(settings, workers=0):
        return [o['env'].get('CUDA_VISIBLE_DEVICES') for o in worker_options(workers, settings)]
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    assert visible(Settings()) == ['0', '1', '2', '3'] and visible(Settings(device='cuda:2')) == ['2']
    assert visible(Settings(), 6) == ['0', '1', '2', '3', '0', '1']
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '5, 7')
    assert visible(Settings()) == ['5', '7']
    assert all(o['resources'] == {'GPU': 1} and o['nthreads'] == 1 for o in worker_options(0, Settings()))
    assert all(o['env'].keys() == {'OMP_NUM_THREADS'} and not o['resources'] for o in worker_options(2, CPU))


@pytest.fixture
def certificates(tmp_path):
    "The settings of Dask that name a certificate, and what holds it."
    pytest.importorskip('cryptography')
    security = pytest.importorskip('distributed').Security.temporary()
    files = {}
    for name, text in security.get_tls_config_for_role('client').items():
        if text and '\n' in text: files[name] = str(tmp_path/f'{name}.pem'); Path(files[name]).write_text(text)
    return {'distributed.comm.tls.ca-file': files['ca_file'], 'distributed.comm.tls.client.cert': files['cert'], 'distributed.comm.tls.client.key': files['key']}, security


def test_an_encrypted_scheduler_is_reached_with_its_certificates(undisturbed, certificates, tmp_path):
    import dask
    from distributed import LocalCluster
    (settings, security), store = certificates, Store(tmp_path/'store')
    small = Plan.of([TEACHERS[1]])
    with LocalCluster(n_workers=1, threads_per_worker=1, processes=False, host='127.0.0.1', protocol='tls://', security=security, dashboard_address='127.0.0.1:0') as cluster:
        address = cluster.scheduler_address
        assert address.startswith('tls://')
        with pytest.raises(Unusable, match='is encrypted; name ca-file, and cert and key'): compute(small, store, address, settings=CPU)
        with dask.config.set(settings): assert compute(small, store, address, settings=CPU) == []
    name = 'weights.safetensors'
    assert finished_files(store, TEACHERS[1])[name] == undisturbed[TEACHERS[1].id][name]


def test_slurms_scheduler_is_encrypted_and_listens_on_one_interface(tmp_path):
    dask = pytest.importorskip('dask')
    distributed = pytest.importorskip('distributed')
    for name in ('dask_jobqueue', 'cryptography'): pytest.importorskip(name)
    before = listening(os.getpid())
    with dask.config.set({'jobqueue.slurm': {**dask.config.get('jobqueue.slurm', {}), **SLURM}}), slurm_cluster(tmp_path) as cluster:
        address, script = cluster.scheduler_address, cluster.job_script()
        assert address.startswith('tls://') and address.split('/')[2].split(':')[0] == distributed.utils.get_ip()
        assert listening(os.getpid()) <= before | {distributed.utils.get_ip(), '127.0.0.1'}
        for words in ('--protocol tls://', f'--tls-key {tmp_path}', '--dashboard-address 127.0.0.1:0'): assert words in script, words
        assert 'BEGIN' not in script and all(path.stat().st_mode & 0o77 == 0 for path in tmp_path.iterdir()) # the key is in no script
        with pytest.raises(OSError): distributed.Client(address.replace('tls://', 'tcp://'), timeout=1)
        [dashboard] = (c for c in psutil.Process().net_connections(kind='inet') if c.laddr.port == cluster.scheduler.services['dashboard'].port)
        assert dashboard.laddr.ip == '127.0.0.1'


def test_slurm_without_cryptography_gets_a_sentence(monkeypatch):
    pytest.importorskip('dask_jobqueue')
    for name in ('cryptography', 'cryptography.x509'): monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(Unusable, match='cryptography, which is not installed: pip install cryptography'): slurm_cluster()


SLURM = {'cores': 8, 'memory': '16GB', 'queue': 'gpu', 'job-extra-directives': ['--gres=gpu:1'],
         'worker-extra-args': ['--lifetime', '55m'], 'job-script-prologue': ['module load python'], 'interface': None}


def test_slurm_jobs_are_described_without_slurm(tmp_path):
    dask = pytest.importorskip('dask')
    for name in ('dask_jobqueue', 'cryptography'): pytest.importorskip(name)
    options = {'jobqueue.slurm': {**dask.config.get('jobqueue.slurm', {}), **SLURM}}
    with dask.config.set(options), slurm_cluster(tmp_path, scheduler_options={'dashboard_address': ':0'}) as cluster:
        lines = cluster.job_script().splitlines()
    assert '#SBATCH --gres=gpu:1' in lines and '#SBATCH -p gpu' in lines and '#SBATCH --cpus-per-task=8' in lines
    [command] = [line for line in lines if 'dask_worker' in line]
    assert '--resources GPU=1' in command and '--lifetime 55m' in command
    places = [lines.index(line) for line in (*SLURM['job-script-prologue'],
                                             'export DASK_DISTRIBUTED__WORKER__DAEMON=False', command)]
    assert places == sorted(places)


def test_slurm_without_its_options_or_its_command_gets_a_sentence(tmp_path, monkeypatch):
    dask = pytest.importorskip('dask')
    for name in ('dask_jobqueue', 'cryptography'): pytest.importorskip(name) # its defaults are part of the configuration from now on
    with dask.config.set({'jobqueue.slurm.cores': None}), pytest.raises(Invalid, match='write cores and memory below '
                                                                                       'jobqueue, slurm'):
        slurm_cluster()
    monkeypatch.setenv('PATH', str(tmp_path))
    with pytest.raises(Unusable, match='needs the command sbatch'):
        compute(PLAN, Store(tmp_path/'store'), 'slurm', settings=CPU)


SBATCH = """#!/bin/sh
for script; do :; done
cp "$script" %(folder)s/job # as sbatch does: the script may be gone before the job starts
{ (sleep .2; exec setsid bash %(folder)s/job) & echo $! > %(folder)s/pid; } > %(folder)s/log 2>&1
echo "Submitted batch job $(cat %(folder)s/pid)"
"""
SCANCEL = '#!/bin/sh\nfor job; do kill -- -$job; done\n'


def test_a_queue_computes_the_plan(undisturbed, tmp_path, monkeypatch):
    "The commands of Slurm, replaced by scripts that start a job at once: everything but the queue itself."
    dask = pytest.importorskip('dask')
    for name in ('dask_jobqueue', 'cryptography'): pytest.importorskip(name)
    for name, text in (('sbatch', SBATCH), ('scancel', SCANCEL)):
        (tmp_path/name).write_text(text % {'folder': tmp_path} if '%' in text else text)
        (tmp_path/name).chmod(stat.S_IRWXU)
    monkeypatch.setenv('PATH', f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    job = {'cores': 1, 'memory': '2GB', 'scheduler-options': {'host': '127.0.0.1', 'dashboard_address': ':0'}}
    options = {'jobqueue.slurm': {**dask.config.get('jobqueue.slurm', {}), **job}}
    small = Plan.of([run for run in PLAN.runs if run.teacher == TEACHERS[0]])
    store = Store(tmp_path/'store')
    with dask.config.set(options): assert compute(small, store, 'slurm', 1, CPU) == []
    for run in small.runs: assert finished_files(store, run) == undisturbed[run.id], run.name
    assert not list((store.root/'plans').iterdir()) # the key of the cluster is gone


def test_torchruns_command_passes_every_setting(tmp_path):
    settings = Settings(device='cpu', threads=3, tf32=False)
    command = torchrun_command(3, 'plan.json', Store(tmp_path), settings, tmp_path, True)
    assert command[:8] == ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '3',
                           '-m', 'cmim_repro.experiments.execution', 'plan.json']
    pairs = dict(word.split('=', 1) for word in command[8:-1])
    assert 'tf32=False, threads=3' in pairs['--settings'] and pairs['--data-root'] == str(tmp_path)
    assert command[-1] == '--allow-unverified'
    assert read_executor('torchrun:3') == ('torchrun', 3)


def test_no_child_outlives_a_failure(tmp_path):
    "One child fails when it sees that the other runs; the other would run for an hour."
    code = """
import os, pathlib, sys, time
folder = pathlib.Path(sys.argv[1])
try: (folder/'first').touch(exist_ok=False)
except FileExistsError:
    while not (folder/'pid').exists() or not (folder/'pid').read_text(): time.sleep(.01)
    sys.exit('error: the second child fails')
(folder/'pid').write_text(str(os.getpid()))
time.sleep(3600)
"""
    with pytest.raises(Unusable, match='^the second child fails$'):
        run_children(['-c', code, str(tmp_path)], 2, tmp_path, lambda last: None, pause=.05)
    with pytest.raises(ProcessLookupError): os.kill(int((tmp_path/'pid').read_text()), 0)


def test_no_child_outlives_an_interrupt(tmp_path):
    code = "import os, pathlib, sys, time; pathlib.Path(sys.argv[1], str(os.getpid())).touch(); time.sleep(3600)"
    children = tmp_path/'children'
    children.mkdir()

    def interrupt(last):
        if len(list(children.iterdir())) == 2: raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt): run_children(['-c', code, str(children)], 2, tmp_path, interrupt, pause=.05)
    for child in children.iterdir():
        with pytest.raises(ProcessLookupError): os.kill(int(child.name), 0)


def test_watching_a_plan_takes_a_tenth_of_the_time_however_many_runs_are_open(monkeypatch):
    clock, asked, done = [0.], [], set()

    def finished(run):
        clock[0] += .001
        asked.append(run)
        return run in done

    monkeypatch.setattr('cmim_repro.experiments.execution.time', SimpleNamespace(monotonic=lambda: clock[0]))
    open_ = OpenRuns(SimpleNamespace(runs=range(200)), SimpleNamespace(finished=finished))
    for _ in range(50): assert open_.look() == list(range(200))
    assert len(asked) == 200
    clock[0] += 2
    done |= set(range(150))
    assert open_.look() == list(range(150, 200)) and len(asked) == 400
    done.add(199)
    assert open_.look() == list(range(150, 200)) and open_.look(now=True) == list(range(150, 199))


OWNED = """
import signal, sys, time
signal.signal(signal.SIGHUP, signal.SIG_DFL) # nohup and some schedulers have it ignored
from cmim_repro.experiments.workers import run_children
child = "import os, pathlib, sys, time; from cmim_repro.experiments.execution import end_with_owner; end_with_owner(.05); "
child += "pathlib.Path(sys.argv[1], str(os.getpid())).touch(); time.sleep(3600)"
run_children(['-c', child, sys.argv[1]], 2, sys.argv[2], lambda last: None)
"""


def gone(process):
    "Has it ended? One that nobody has buried yet has."
    try: return Path(f'/proc/{process}/stat').read_text().rpartition(')')[2].split()[0] == 'Z'
    except OSError: return True


@pytest.mark.skipif(not Path('/proc/self/stat').exists(), reason='needs /proc')
@pytest.mark.parametrize('how', [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_workers_end_with_the_process_they_work_for_however_it_ends(tmp_path, how):
    children, logs = tmp_path/'children', tmp_path/'logs'
    children.mkdir()
    logs.mkdir()
    owner = subprocess.Popen([sys.executable, '-c', OWNED, str(children), str(logs)])
    def wait_until(condition):
        until = time.monotonic() + 60
        while not condition(): assert time.monotonic() < until; time.sleep(.05)
    wait_until(lambda: len(list(children.iterdir())) == 2)
    owner.send_signal(how)
    owner.wait(60)
    wait_until(lambda: all(gone(child.name) for child in children.iterdir()))


DYING = """
import os, pathlib, signal, sys
folder, deaths = pathlib.Path(sys.argv[1]), int(sys.argv[2])
print('computing kd-cnn_tiny', flush=True)
count = len(list(folder.glob('death*')))
if count < deaths:
    (folder/f'death{count}').touch()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_worker_that_a_signal_ends_is_started_again_and_its_log_is_kept(tmp_path):
    with pytest.warns(UserWarning, match='ended by SIGKILL while it computed kd-cnn_tiny; its log is .*try 1 of 3') as said:
        run_children(['-c', DYING, str(tmp_path), '2'], 1, tmp_path, lambda last: None, pause=.05)
    [log] = tmp_path.glob('*.log')
    assert len(said) == 2 and str(log) in str(said[0].message) and log.read_text().count('computing') == 3


@pytest.mark.filterwarnings('ignore:A worker ended')
def test_a_worker_that_always_dies_ends_with_a_sentence(tmp_path):
    with pytest.raises(Unusable, match='ended by SIGKILL 4 times.*kd-cnn_tiny; its log is') as said:
        run_children(['-c', DYING, str(tmp_path), '99'], 1, tmp_path, lambda last: None, pause=.05)
    assert '\n' not in str(said.value) and len(list(tmp_path.glob('death*'))) == 4


ADVANCING = DYING.replace("    os.kill", "    place = folder/'store'/'kd-cnn_tiny'\n    place.mkdir(parents=True, exist_ok=True)\n"
                          "    if count < int(sys.argv[3]): (place/'checkpoint.pt').write_text(str(count))\n    os.kill")


@pytest.mark.filterwarnings('ignore:A worker ended')
def test_a_worker_that_got_further_before_it_died_uses_up_no_try(tmp_path):
    "Six deaths with a new checkpoint each, and four more without one, which are too many."
    def run(deaths, gains): run_children(['-c', ADVANCING, str(tmp_path), str(deaths), str(gains)], 1, tmp_path, lambda last: None, pause=.05, store=Store(tmp_path/'store'))
    run(6, 6)
    assert len(list(tmp_path.glob('death*'))) == 6
    for path in tmp_path.glob('death*'): path.unlink()
    with pytest.raises(Unusable, match='ended by SIGKILL 4 times'): run(99, 6)
    assert len(list(tmp_path.glob('death*'))) == 10


@pytest.mark.filterwarnings('ignore:A worker ended')
def test_the_others_go_on_when_one_dies(tmp_path):
    code = "import os, pathlib, signal, sys\nfolder = pathlib.Path(sys.argv[1])\ntry: (folder/'first').touch(exist_ok=False)\n"
    code += "except FileExistsError: os.kill(os.getpid(), signal.SIGKILL)\n"
    run_children(['-c', code, str(tmp_path)], 2, tmp_path, lambda last: None, pause=.2) # one has done all there was


def test_a_workers_own_failure_names_its_run_and_not_a_line_of_equals_signs(tmp_path):
    code = "import sys; print('computing ls-cnn_tiny'); print('[####] 3/4 runs'); print('ValueError: no'); print('=====', flush=True); sys.exit(1)"
    with pytest.raises(Unusable, match="with 'ValueError: no' while it computed ls-cnn_tiny; its log is"):
        run_children(['-c', code], 1, tmp_path, lambda last: None, pause=.05)
    code = "import sys; print('Signal 9 (SIGKILL) received by PID 7'); print('=====', flush=True); sys.exit(1)" # a launcher
    with pytest.warns(UserWarning, match='ended by SIGKILL'), pytest.raises(Unusable, match='by SIGKILL 4 times'):
        run_children(['-c', code], 1, tmp_path, lambda last: None, pause=.05)


def test_plans_and_unfinished_files_of_killed_processes_are_removed_by_the_next(tmp_path):
    store, folder = Store(tmp_path/'store'), tmp_path/'store'/'plans'
    folder.mkdir()
    old, own, other, log = (folder/name for name in (f'{platform.node()}-4194304-1.json', f'{platform.node()}-{os.getpid()}-1.json', 'elsewhere-7-1.json', 'elsewhere-7-1-0.log'))
    for path in (old, own, other, log): path.touch()
    os.utime(log, (0, 0))
    run = PLAN.runs[0]
    store.start(run)
    (store.folder(run)/'.checkpoint.ptabc').touch()
    with _plan_file(PLAN, store) as file: assert sorted(folder.iterdir()) == sorted([own, other, file])
    store.start(run)
    assert [path.name for path in store.folder(run).iterdir()] == ['run.json']


def test_waiting_is_told_after_a_minute_and_ends_after_hours(tmp_path, monkeypatch):
    clock, said, store, run = [0.], [], Store(tmp_path), PLAN.runs[0]
    monkeypatch.setattr('cmim_repro.experiments.execution.time', SimpleNamespace(monotonic=lambda: clock[0]))
    store.start(run)
    patience = Patience(store, said.append)
    patience.look([run])
    assert not said
    for clock[0] in (61., 5*3600.): patience.look([run])
    assert said[0] == f'{run.name}, which another process computes'
    store.save_tensors(run, 'weights.safetensors', {})
    clock[0] = 10*3600.
    patience.look([run])
    clock[0] = 17*3600.
    with pytest.raises(Unusable, match=f'{run.name} is held by another process, and nothing was written for 6 hours.*lock'): patience.look([run])


@pytest.mark.parametrize('rank', ['', '0', '7'])
@pytest.mark.parametrize('size', ['', '4', 'x'])
def test_what_a_queue_left_in_the_environment_is_not_waited_for(monkeypatch, size, rank):
    monkeypatch.delenv('TORCHELASTIC_RUN_ID', raising=False)
    left = {'WORLD_SIZE': size, 'RANK': rank, 'LOCAL_RANK': rank, 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': '1'}
    for name, value in left.items(): monkeypatch.setenv(name, value)
    monkeypatch.setattr('torch.cuda.is_available', lambda: True)
    monkeypatch.setattr('torch.cuda.device_count', lambda: 1)
    join_processes(torch.device('cpu'))
    assert processes() == 1 and read_settings('cuda').resolve() == torch.device('cuda')


@pytest.mark.parametrize('size, rank', [('', '0'), ('2', ''), ('', '')])
def test_a_half_environment_of_torchrun_is_none(monkeypatch, size, rank):
    for name, value in {'TORCHELASTIC_RUN_ID': 'none', 'WORLD_SIZE': size, 'RANK': rank}.items(): monkeypatch.setenv(name, value)
    join_processes(torch.device('cpu'))
    assert processes() == 1
