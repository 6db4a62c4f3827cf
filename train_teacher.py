"""Train the AR teacher alone. It is saved as teacher.pt in the folder of the run.

    python train_teacher.py                                         # the maze
    python train_teacher.py --dataset text --train-files input.txt

gumbel_distill.py with the same settings finds it there, and trains students only.
"""

import gumbel_distill as gd
import sample


def main(words=None):
    cfg = gd.parse({}, words=words)
    gd.main({}, words=words)
    if gd.RANK == 0:
        sample.main(["--ckpt", f"{cfg.out_dir}/teacher.pt", "--device", cfg.device])


if __name__ == "__main__":
    main()
