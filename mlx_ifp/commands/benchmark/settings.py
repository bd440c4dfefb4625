"""The numbers of ``mlx_ifp.benchmark``."""

from dataclasses import asdict, dataclass, field

from ...errors import IFPError

DEFAULT_SCALE = 8


@dataclass(frozen=True)
class Settings:
    """The numbers of the command line."""

    prompt_tokens: tuple[int, ...] = field(
        default=(512,), metadata={"help": "Random tokens in the prompt; one table for each number"}
    )
    generation_tokens: int = field(default=128, metadata={"help": "Tokens to generate"})
    num_trials: int = field(default=5, metadata={"help": "Runs of each row, after the warm-up"})
    samples: int = field(
        default=1,
        metadata={
            "help": "Answers to the prompt, decoded as one batch; more than 1 are sampled at "
            "temperature 1"
        },
    )
    prefill_step_size: int = field(
        default=2048, metadata={"help": "Prompt tokens to process at a time"}
    )
    seed: int = field(default=0, metadata={"help": "PRNG seed of the prompt"})

    def check(self) -> None:
        """Raises IFPError if a number is too small."""
        # Decoding is timed from the first token to the last, so there must be two.
        least = {"generation_tokens": 2, "seed": 0}
        for name, values in asdict(self).items():
            for value in values if isinstance(values, tuple) else (values,):
                if value < (lowest := least.get(name, 1)):
                    option = name.replace("_", "-")
                    raise IFPError(f"--{option} must be at least {lowest}, not {value}.")
        if len(set(self.prompt_tokens)) < len(self.prompt_tokens):
            raise IFPError("--prompt-tokens has a number twice.")
