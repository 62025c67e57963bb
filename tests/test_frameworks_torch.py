"""What PyTorch gets of a feed, alone, in its DataLoaders, under Lightning and over two ranks; examples/unet_torch.py killed and resumed."""

from __future__ import annotations

import faulthandler
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest
from psycopg import sql

torch = pytest.importorskip("torch")

from torch.utils.data import DataLoader  # noqa: E402

from catalog.errors import UsageError  # noqa: E402
from loaderd import Feed, FeedError  # noqa: E402
from loaderd.torch import FeedDataset  # noqa: E402
from loaderd.workers import python  # noqa: E402
from tests.conftest import _create, _named  # noqa: E402
from tests.labelled import COUNT, SEQUENCES, check_digits, check_sequences, check_views, label  # noqa: E402
from tests.processes import wait_until  # noqa: E402

REPOSITORY = Path(__file__).resolve().parent.parent
ARGUMENTS: dict[str, Any] = {"structures": ["inner"], "batch_size": 4, "seed": 7}  # 12 samples: 3 steps
IDS = ("images", "masks", "sample_ids")


@pytest.fixture(scope="module")
def served(server_url: str, full_template: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Environment of one database with the synthetic studies and one daemon, for all tests here."""
    name = f"torch_{uuid.uuid4().hex[:8]}"
    _create(server_url, name, full_template)
    folder = tmp_path_factory.mktemp("run", numbered=True)
    folder.chmod(0o700)
    variables = {"CATALOG_DATABASE_URL": _named(server_url, name), "LOADERD_RUN": str(folder)}
    command, environment = python("-m", "loaderd", "serve", "--workers", "1")
    with subprocess.Popen(command, env=environment | variables, stderr=subprocess.DEVNULL, cwd="/") as process:
        try:
            assert wait_until(lambda: bool(list(folder.glob("*.sock"))), timeout_s=90)
            yield variables
        finally:
            process.terminate()
    with psycopg.connect(server_url, autocommit=True) as conn:
        conn.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


@pytest.fixture(autouse=True)
def _there(served: dict[str, str], _own_environment: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in served.items():
        monkeypatch.setenv(name, value)


def expected(epochs: int) -> list[list[int]]:
    """Return the sample ids of an epoch, batch by batch, without PyTorch, for some epochs."""
    with Feed(**ARGUMENTS) as feed:
        return [[batch.sample_ids.tolist() for batch in feed.epoch()] for _ in range(epochs)]


def flat(epochs: list[list[Any]]) -> list[Any]:
    return list(itertools.chain.from_iterable(epochs))


# ------------------------------------------------------------------------------------------ tensors


def test_tensors_are_the_batches_and_can_be_written_to() -> None:
    """Each iter() is one epoch of (images, masks) with the batches' values and dtypes, which are the trainer's own, to write to."""
    with Feed(**ARGUMENTS) as feed:
        truth = [[(batch.images.copy(), batch.masks.copy()) for batch in feed.epoch()] for _ in range(2)]  # type: ignore[union-attr]
    with Feed(**ARGUMENTS, slots=2) as feed:
        dataset = feed.torch()
        assert isinstance(dataset, FeedDataset) and len(dataset) == 3
        kept = [list(dataset) for _ in range(2)]  # more than there are slots
        for given, (images, masks) in zip(flat(truth), flat(kept), strict=True):
            assert images.dtype == torch.float32 and masks.dtype == torch.bool
            assert np.array_equal(images.numpy(), given[0]) and np.array_equal(masks.numpy(), given[1])
            images.add_(1)
            masks.logical_not_()
            assert np.array_equal(images.numpy(), given[0] + 1) and np.array_equal(masks.numpy(), ~given[1])


def test_fields_say_which_sample_is_behind_a_row() -> None:
    """`fields` chooses what a tuple holds, in that order, with the batch's dtypes; what a feed has not is not in it."""
    with Feed(**ARGUMENTS, dtype="float16", tail="pad") as feed, Feed(**ARGUMENTS) as other:
        dataset = feed.torch(fields=["sample_ids", "valid", "sample_keys", "present", "images"])
        for batch, (ids, valid, keys, present, images) in zip(other.epoch(), dataset, strict=True):
            assert ids.dtype == torch.int64 and ids.tolist() == batch.sample_ids.tolist()
            assert valid.dtype == present.dtype == torch.bool and valid.all() and present.shape == (4, 1)
            assert keys.dtype == torch.uint8 and np.array_equal(keys.numpy(), batch.sample_keys)
            assert images.dtype == torch.float16 and np.array_equal(images.numpy(), batch.images.astype(np.float16))
    with Feed(batch_size=4, limit=4) as feed:
        [(images,)] = list(feed.torch())
        assert images.shape == (4, 64, 64)


def test_without_the_copy_tensors_hold_their_slot() -> None:
    """With copy=False a tensor is the ring's memory: it stays as it is while held, holds its slot, and a write to it ends the process."""
    with Feed(**ARGUMENTS, slots=2) as feed:
        batches = iter(feed.torch(copy=False))
        (first, _), (second, _) = next(batches), next(batches)
        feed.timeout_s = 1  # only now: what is on its way may take longer
        before = first.clone(), second.clone()
        assert first.numpy().base is not None
        child = os.fork()
        if not child:
            faulthandler.disable()
            first.add_(1)
            os._exit(0)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGSEGV
        with pytest.raises(FeedError, match="this process holds all 2 slots"):
            next(batches)
        assert torch.equal(first, before[0]) and torch.equal(second, before[1])
    with Feed(**ARGUMENTS, slots=2) as feed:
        assert [images.sum().item() for _ in range(3) for images, _ in feed.torch(copy=False)]  # nothing is held: nothing waits


def test_arguments_that_cannot_be_right() -> None:
    """A device that is not there and fields that do not exist are told in one line."""
    with Feed(batch_size=4) as feed:
        for options, says in (
            ({"device": "cuda:99"}, "'cuda:99': PyTorch sees [0-9]+ CUDA devices"),
            ({"device": "meta"}, r"feed.torch\(copy=False\)"),
            ({"device": "gpu"}, "must be 'cpu' or 'cuda'"),
            ({"fields": "images"}, "must be a list of some of images, masks"),
            ({"fields": ["pixels"]}, "must be a list of some of images, masks"),
            ({"fields": ["images", "masks"]}, "'masks': this feed has none"),
            ({"fields": ["labels"]}, "'labels': this feed has none"),
            ({"copy": "x"}, "^copy='x': must be True or False$"),
        ):
            with pytest.raises(UsageError, match=says) as raised:
                next(iter(feed.torch(**options)))
            assert "\n" not in str(raised.value)


def test_labels_and_sequences(ingested: str, tmp_path: Path) -> None:
    """A tuple is (images, labels), with structures (images, masks, labels), as int64; of sequences labels are the digits (B, L), and
    `fields` has their boxes and members; DataLoader passes all of it on."""
    label(ingested, tmp_path)
    with Feed(labels="label", batch_size=8) as feed:
        batches = list(feed.torch())
        assert all(labels.dtype == torch.int64 for _, labels in batches)
        assert sum(check_digits(images, labels) for images, labels in batches) == COUNT
    with Feed(structures=["inner"], labels="view", batch_size=8) as feed:
        assert sum(check_views(masks, labels) for _, masks, labels in feed.torch()) == 12
    with Feed(labels="label", sequences=SEQUENCES, batch_size=8) as feed:
        assert sum(check_sequences(images, digits) for images, digits in feed.torch()) == COUNT
        loader = DataLoader(feed.torch(fields=["images", "labels", "boxes", "members", "sample_ids"]), batch_size=None)
        seen = 0
        for images, digits, boxes, members, ids in loader:
            assert digits.dtype == boxes.dtype == members.dtype == torch.int64
            assert ((members == ids[:, None]).any(1)).all() and torch.equal(members == -1, digits == -1)
            seen += check_sequences(images, digits, boxes)
        assert seen == COUNT


# ------------------------------------------------------------------------------------------ DataLoaders


def test_in_a_dataloader() -> None:
    """DataLoader(batch_size=None) passes batches on, epoch after epoch; one with workers is refused with the reason, and harms nothing."""
    with Feed(**ARGUMENTS) as feed:
        dataset = feed.torch(fields=IDS)
        with pytest.raises(FeedError, match="must have num_workers=0"):
            next(iter(DataLoader(dataset, batch_size=None, num_workers=1)))
        loader = DataLoader(dataset, batch_size=None)
        assert len(loader) == 3
        assert [[ids.tolist() for _, _, ids in loader] for _ in range(3)] == expected(3)


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata 0.11 on torch 2.13
@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_state_of_torchdatas_loader(steps: int) -> None:
    """StatefulDataLoader: its state after the k-th batch, through JSON, goes on with the k+1-th, and then with the next epochs."""
    loaders = pytest.importorskip("torchdata.stateful_dataloader")
    order = flat(expected(3))
    run = f"stateful-{steps}"
    with Feed(**ARGUMENTS, run=run) as feed:
        loader = loaders.StatefulDataLoader(feed.torch(fields=IDS), batch_size=None, num_workers=0)
        seen = []
        for _ in range(2):
            for _, _, ids in loader:
                seen.append(ids.tolist())
                if len(seen) == steps:
                    break
            if len(seen) == steps:
                break
        state = json.loads(json.dumps(loader.state_dict()))
    assert seen == order[:steps]
    with Feed(**ARGUMENTS, run=run) as feed:
        loader = loaders.StatefulDataLoader(feed.torch(fields=IDS), batch_size=None, num_workers=0)
        loader.load_state_dict(state)
        rest: list[list[int]] = []
        while len(rest) < 9 - steps:
            rest += [ids.tolist() for _, _, ids in loader]
        assert rest == order[steps:]


@pytest.mark.filterwarnings("ignore")  # Lightning's, of what is not a concern here
def test_under_lightning(tmp_path: Path) -> None:
    """Trainer.fit over several epochs, with the dataset or a DataLoader; a checkpoint in the middle of an epoch goes on behind it."""
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Conv2d(1, 1, 1)
            self.seen: list[list[int]] = []

        def training_step(self, batch: Any, number: int) -> Any:
            images, masks, ids = batch
            self.seen.append(ids.tolist())
            return (self.layer(images[:, None]) - masks[:, None].float()).abs().mean()

        def predict_step(self, batch: Any, number: int) -> Any:
            return batch[2]

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=1e-6)

    def trainer(**options: Any) -> Any:
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
        return lightning.Trainer(accelerator="cpu", default_root_dir=tmp_path, **{**quiet, **options})

    order = expected(4)
    with Feed(**ARGUMENTS) as feed:
        loader, module = DataLoader(feed.torch(fields=IDS), batch_size=None), Module()
        trainer(max_epochs=2).fit(module, loader)
        assert module.seen == flat(order[:2])
        predicted = trainer().predict(module, loader)  # here Lightning makes a DataLoader of its own
        assert [ids.tolist() for ids in predicted] == order[2]
    module = Module()
    saving = lightning.pytorch.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=4, save_top_k=-1, filename="at-{step}")
    with Feed(**ARGUMENTS, run="lightning") as feed:
        trainer(max_steps=4, callbacks=[saving], enable_checkpointing=True).fit(module, feed.torch(fields=IDS))
    assert module.seen == flat(order)[:4]
    [checkpoint] = tmp_path.glob("at-*.ckpt")
    module = Module()
    with Feed(**ARGUMENTS, run="lightning") as feed:
        trainer(max_epochs=4).fit(module, feed.torch(fields=IDS), ckpt_path=checkpoint)
    assert module.seen == flat(order)[4:]


# ------------------------------------------------------------------------------------------ the example

# Saves every fifth step (an epoch has two); dies behind the first save, before the next batch; rank 1 of two then sees its peer gone.
EXAMPLE = """
import importlib.util, json, os, signal, sys
from pathlib import Path
sys.path.insert(0, str(Path(sys.argv[1]).parent))
spec = importlib.util.spec_from_file_location("unet_torch", sys.argv[1])
unet = importlib.util.module_from_spec(spec)
spec.loader.exec_module(unet)
unet.SAVE_EVERY = 5
checkpoint, dies = Path(sys.argv[2]), sys.argv[3] == "dies"
save = unet.save
def saved(path, content):
    save(path, content)
    if dies and len(content["losses"]) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
unet.save = saved
unet.begin()
found = [unet.train(5, checkpoint, resume=not dies)]
if not dies:
    found.append(unet.train(5, checkpoint, resume=False))
print(json.dumps(found))
"""


def start(num_ranks: int, checkpoint: Path, what: str) -> list[subprocess.Popen[str]]:
    """Start the example's training in `num_ranks` processes, as torchrun does."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    processes = []
    for rank in range(num_ranks):
        environment = dict(os.environ)
        if num_ranks > 1:
            environment |= {"RANK": str(rank), "WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, "-c", EXAMPLE, str(REPOSITORY / "examples" / "unet_torch.py"), str(checkpoint), what]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd="/"))
    return processes


def test_the_example_without_a_checkpoint_says_so(tmp_path: Path) -> None:
    """`--resume` where nothing was saved is one line that names the file, before anything is ingested."""
    missing, home = tmp_path / "none.pt", tmp_path / "home"
    command = [sys.executable, str(REPOSITORY / "examples" / "unet_torch.py"), "--resume", "--checkpoint", str(missing)]
    done = subprocess.run(command, env={**os.environ, "CATALOG_HOME": str(home)}, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2 and f"--resume: there is no checkpoint {missing}" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr and list(tmp_path.iterdir()) == []


def test_the_example_killed_and_resumed_has_the_same_losses(catalog: Any, tmp_path: Path) -> None:
    """Killed by SIGKILL behind the save of a state in the middle of an epoch, alone and with two ranks, the U-Net goes on and ends with
    the loss curve, to the last bit, of a training that nobody disturbed, and learns."""
    split = tmp_path / "split.csv"
    split.write_text("patient,part\nSYN0001,train\nSYN0002,train\nSYN0003,val\n")
    assert catalog("split", "import", "unet", str(split)).returncode == 0
    checkpoints = {num_ranks: tmp_path / f"{num_ranks}.pt" for num_ranks in (1, 2)}
    killed = {num_ranks: start(num_ranks, checkpoint, "dies") for num_ranks, checkpoint in checkpoints.items()}
    for processes in killed.values():
        for process in processes:
            process.communicate(timeout=600)
        assert processes[0].returncode == -signal.SIGKILL
    assert killed[2][1].returncode not in (0, None)
    resumed = {num_ranks: start(num_ranks, checkpoint, "goes on") for num_ranks, checkpoint in checkpoints.items()}
    for processes in resumed.values():
        for process in processes:
            printed, errors = process.communicate(timeout=600)
            assert process.returncode == 0, errors
            gone_on, undisturbed = json.loads(printed.splitlines()[-1])
            assert len(gone_on) == 10 and gone_on == undisturbed
            assert len(set(gone_on)) == 10 and sum(gone_on[-2:]) < sum(gone_on[:2])
