// SPDX-License-Identifier: GPL-2.0-only
/* Flags about the probes. They lie below the files that write them and the files that read them. */
#include "alive.h"

bool sniffer_alive_names;
bool sniffer_alive_release;
u32 sniffer_alive_fired;
DEFINE_STATIC_KEY_FALSE(sniffer_listening);
