#!/bin/sh
# Debian's Prometheus with promtool, for tests/deploy. Needs root.
set -eu
command -v promtool >/dev/null && exit 0
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends prometheus
