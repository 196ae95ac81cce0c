"""WebShop: shopping in a catalogue by searches and clicks."""
