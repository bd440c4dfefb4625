"""Train all arms of the comparison, one after another. Run the script again to go on.

    python run.py --model smollm2-dense --data data --runs runs

Each arm is one ``mlx_ifp.train`` with the same data in the same order, the same number of tokens
and the same k. The arms differ in what selects the channels. Other flags go to ``mlx_ifp.train``.
"""

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ARMS = {
    "static": ["--select-by", "static"],
    "prompt": ["--select-by", "prompt", "--group-masks"],
    "task": ["--select-by", "task", "--tasks", str(HERE / "tasks.yaml")],
}


def main() -> None:
    """Train what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="The dense source model")
    parser.add_argument("--data", required=True, help="Directory with {train,valid}.jsonl")
    parser.add_argument("--runs", type=Path, required=True, help="Where the runs go")
    parser.add_argument("--keep", type=int, nargs="+", default=[768, 384], help="Values of k")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="One run each")
    args, more = parser.parse_known_args()
    for seed in args.seeds:
        for keep in args.keep:
            for arm, flags in ARMS.items():
                run = args.runs / f"{arm}-{keep}-{seed}"
                if (run / "ifp").exists():
                    continue
                command = [sys.executable, "-m", "mlx_ifp", "train", *flags,
                           "-c", str(HERE / "train.yaml"), "--model", args.model,
                           "--data", args.data, "--run-path", str(run),
                           "--targets-path", str(args.runs / "targets"),
                           "--keep", str(keep), "--seed", str(seed), *more]  # fmt: skip
                if any(run.glob("checkpoint-*")):
                    command.append("--resume")
                print(" ".join(command), flush=True)
                done = subprocess.run(command)
                if done.returncode:
                    # Training has said why.
                    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
