"""A process with scales of its own in every coordinate, and each of its coordinates as a process alone."""

import torch

from pyro_diffusion.denoisers import MixtureDenoiser
from pyro_diffusion.processes import GaussianProcess, SeededNoise
from pyro_diffusion.schedules import LogLinear

F64 = torch.float64
RATES, SHIFTS, GROWTHS = (1.0, 0.6), (0.0, 1.5), (0.0, 0.7)
# Independent normals: what holds for the pair holds for each coordinate alone.
MEAN, VARIANCE = (0.8, -0.5), 0.3


class PerCoordinate(GaussianProcess):
    r"""Two coordinates of log-SNR rate * clock + shift and of scale exp(growth * t)."""

    def __init__(self, schedule=None, event_dim=1):
        super().__init__(LogLinear(10.0, -10.0) if schedule is None else schedule, event_dim)
        for name, numbers in (("rate", RATES), ("shift", SHIFTS), ("growth", GROWTHS)):
            self.register_buffer(name, torch.tensor(numbers, dtype=F64))

    def scales(self, level):
        rate, shift, growth = (v.to(level.clock) for v in (self.rate, self.shift, self.growth))
        log_snr, gain = rate * level.clock + shift, torch.exp(growth * level.t)
        return level._replace(
            log_snr=log_snr,
            alpha=gain * torch.sigmoid(log_snr).sqrt(),
            sigma=gain * torch.sigmoid(-log_snr).sqrt(),
        )


class Coordinate(LogLinear):
    """The schedule of one of the two coordinates, for a process of one noise level."""

    def __init__(self, index):
        rate, shift = RATES[index], SHIFTS[index]
        super().__init__(rate * 10.0 + shift, -rate * 10.0 + shift)
        self.growth = GROWTHS[index]

    def _gain(self, log_snr):
        width = self.log_snr_max - self.log_snr_min
        return torch.exp(self.growth * (self.log_snr_max - log_snr) / width)

    def _signal(self, log_snr):
        return self._gain(log_snr) * super()._signal(log_snr)

    def _noise(self, log_snr):
        return self._gain(log_snr) * super()._noise(log_snr)

    def _signal_slope(self, log_snr):
        own = -self.growth / (self.log_snr_max - self.log_snr_min)
        return own + super()._signal_slope(log_snr)


def normal(point_mass=False):
    """The exact denoiser of the two independent normals, under the process of both."""
    mean = torch.tensor([MEAN], dtype=F64)
    return MixtureDenoiser(PerCoordinate(), torch.ones(1, dtype=F64), mean, VARIANCE, point_mass)


def alone(index, point_mass=False):
    """The exact denoiser of one of them, under a process of one coordinate."""
    mean = torch.tensor([[MEAN[index]]], dtype=F64)
    process = GaussianProcess(Coordinate(index))
    return MixtureDenoiser(process, torch.ones(1, dtype=F64), mean, VARIANCE, point_mass)


class ColumnNoise(SeededNoise):
    """Of the normal numbers that the pair of coordinates gets from a seed, those of one coordinate."""

    def __init__(self, seed, index):
        super().__init__(seed)
        self.index = index

    def normal(self, shape, like, event_dim=0):
        both = super().normal((*shape[:-1], len(RATES)), like, event_dim)
        return both[..., self.index : self.index + 1]
