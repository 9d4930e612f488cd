"""All outcomes of a random program, each once, with their probabilities."""


class Explorer:
    """Walks through all branches of a random program, one run each: `choose` replays a path, then goes on."""

    def __init__(self):
        self.path, self.widths, self.weight, self.depth = [], [], 1.0, 0

    def choose(self, p):
        branches = p.double() / p.double().sum()
        possible = branches.nonzero()[:, 0].tolist()
        if self.depth == len(self.path):
            self.path.append(0)
            self.widths.append(len(possible))
        branch = possible[self.path[self.depth]]
        self.depth += 1
        self.weight *= branches[branch].item()
        return branch

    def next_run(self):
        """False after the last path."""
        while self.path and self.path[-1] + 1 == self.widths[-1]:
            self.path.pop()
            self.widths.pop()
        self.weight, self.depth = 1.0, 0
        if not self.path:
            return False
        self.path[-1] += 1
        return True
