// SPDX-License-Identifier: GPL-2.0-only
/* Flags of what the module is told, below those who write and who read them. */
#include "alive.h"

bool sniffer_alive_names;
bool sniffer_alive_release;
u32 sniffer_alive_fired;
DEFINE_STATIC_KEY_FALSE(sniffer_listening);
