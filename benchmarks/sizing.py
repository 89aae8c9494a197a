"""How many machines an archive needs: ``python -m benchmarks.sizing``, from growth.csv.

For CPUs alone what two detectors on this machine's cores take at most, scaled. For a GPU the CPUs that keep
it busy: what decoding, measuring and packing a photo take here, times the photos a second that the network
makes there, which nobody has measured: 100 and 400 are given to interpolate between. Prices are round
figures, not offers.
Writes results/sizing.csv.
"""

import sys

from benchmarks.tables import cores_of, measured_on, read_csv, write_csv

DOLLARS_PER_VCPU_HOUR = 0.05
DOLLARS_PER_GPU_HOUR = 0.60
GPU_RATES = (100, 400)
MILLION = 1_000_000


def main() -> int:
    """Write results/sizing.csv."""
    rows = []
    for row in read_csv("growth"):
        if row["axis"] != "megapixels":
            continue
        each = float(row["detectors_photos_per_second"]) / cores_of(row)
        hours = MILLION / each / 3600
        rows.append(
            {
                "machine": "1 vCPU",
                "megapixels": row["megapixels"],
                "photos_per_second": f"{each:.1f}",
                "vcpus_per_gpu": "",
                "hours_per_million": f"{hours:.0f}",
                "dollars_per_million": f"{hours * DOLLARS_PER_VCPU_HOUR:.2f}",
                **measured_on(row),
            }
        )
        for rate in GPU_RATES:
            vcpus = rate * (float(row["decode_ms"]) + float(row["encode_ms"])) / 1000
            hours = MILLION / rate / 3600
            price = DOLLARS_PER_GPU_HOUR + vcpus * DOLLARS_PER_VCPU_HOUR
            rows.append(
                {
                    "machine": f"1 GPU of {rate} photos/s",
                    "megapixels": row["megapixels"],
                    "photos_per_second": str(rate),
                    "vcpus_per_gpu": f"{vcpus:.1f}",
                    "hours_per_million": f"{hours:.1f}",
                    "dollars_per_million": f"{hours * price:.2f}",
                    **measured_on(row),
                }
            )
    write_csv("sizing", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
