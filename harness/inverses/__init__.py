"""The inverses of reversible blocks, measured and held against baselines. Imports torch and revnet_core."""

from harness.inverses.chain import Invertible as Invertible
