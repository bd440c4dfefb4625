"""What the threads of all clients share: the models, the scheduler, the rules of access."""

import argparse
import copy
import threading

from mlx_lm.generate import make_text_state_machine
from mlx_lm.server import ToolCallFormatter, get_system_fingerprint
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ...model import IFPModel
from .access import Access
from .jobs import Job, Jobs
from .pieces import Reader
from .stand_in import Scheduler
from .tasks_as_models import Models
from .watch import Watcher


class Service:
    """A checkpoint that is served.

    Args:
        model (IFPModel): from :func:`mlx_ifp.load`.
        tokenizer: from the same call.
        models: its ids.
        access: who may ask.
        args: the command's options.
        scheduler: what generates.

    Attributes:
        models, access, scheduler: as above.
        jobs: makes jobs of requests.
        watcher: notices clients that go away.
        fingerprint: of the machine and the versions, for answers.
    """

    def __init__(
        self,
        model: IFPModel,
        tokenizer: TokenizerWrapper,
        models: Models,
        access: Access,
        args: argparse.Namespace,
        scheduler: Scheduler,
    ) -> None:
        self.models, self.access, self.scheduler = models, access, scheduler
        # Hugging Face's tokenizers are not made for several threads, and the scheduler has one.
        self._tokenizer = copy.deepcopy(tokenizer)
        self._lock = threading.Lock()
        self.jobs = Jobs(models, self._tokenizer, args)
        self.watcher = Watcher()
        self.fingerprint = get_system_fingerprint()
        self._machine = make_text_state_machine(self._tokenizer)

    def decode(self, token: int) -> str:
        """The text of a token."""
        with self._lock:
            return self._tokenizer.decode([token])

    def count(self, job: Job) -> int:
        """How many tokens a prompt has."""
        with self._lock:
            encoded = job.request.encode(self._tokenizer)
            return len(self._tokenizer.encode(encoded) if isinstance(encoded, str) else encoded)

    def reader(self, job: Job, tokens: list[int]) -> Reader:
        """What reads the answer to a prompt of these tokens."""
        tokenizer = self._tokenizer
        formatter = None
        if job.tools and tokenizer.tool_parser is not None:
            formatter = ToolCallFormatter(tokenizer.tool_parser, job.tools, job.stream)
        return Reader(
            self._machine,
            self._initial(tokens) if job.chat else "normal",
            formatter,
            job.stops,
            set(tokenizer.eos_token_ids),
            self.decode,
            job.one_call,
        )

    def _initial(self, tokens: list[int]) -> str:
        """The state in which an answer begins: some templates open the model's thoughts."""
        tokenizer, initial = self._tokenizer, "normal"
        if tokenizer.has_thinking and (
            tokenizer.rfind_think_start(tokens) > tokenizer.rfind_think_end(tokens)
        ):
            initial = "reasoning"
        return tokenizer.response_initial_state or initial
