"""The data: where it comes from (sources), its form on disk (shards), its gate (expectations), its reader."""
