"""What every slot did and when, from an event log: as a picture, and as tracks for Perfetto."""
