/* SPDX-License-Identifier: MIT */
/*
 * Reads what may never come. /proc/PID/cmdline is the process's own memory: a read waits for the
 * lock of its address space. A process can hold this lock for ever: it maps a file that its own
 * FUSE server does not write back. Such a read ends only with the process, or with ours.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "shared_proto.h"
#include "host.h"

#define MOST_LEFT 16
#define STACK (64 << 10)

struct errand {
	pthread_cond_t told;
	int done, left;
	int result;
	int nice; /* of who waits: a thread that it starts would not have it */
	uint32_t size;
	char path[512];
	char buf[];
};

/* For all errands, and how many of them nobody waits for any more. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static uint32_t left_behind;

static void let_go(struct errand *one)
{
	pthread_cond_destroy(&one->told);
	free(one);
}

static void *run(void *argument)
{
	struct errand *one = argument;
	int result, left;

	setpriority(PRIO_PROCESS, (id_t)syscall(SYS_gettid), one->nice);
	result = host_read(one->path, one->buf, one->size);
	pthread_mutex_lock(&lock);
	one->result = result;
	one->done = 1;
	left = one->left;
	left_behind -= (uint32_t)left;
	pthread_cond_signal(&one->told);
	pthread_mutex_unlock(&lock);
	if (left)
		let_go(one);
	return NULL;
}

static int begin(struct errand *one)
{
	pthread_attr_t attributes;
	pthread_t thread;
	int error;

	pthread_attr_init(&attributes);
	pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
	pthread_attr_setstacksize(&attributes, STACK);
	error = pthread_create(&thread, &attributes, run, one);
	pthread_attr_destroy(&attributes);
	return error;
}

static struct errand *errand_of(const char *path, uint32_t size)
{
	struct errand *one = calloc(1, sizeof(*one) + size);
	pthread_condattr_t attributes;

	if (!one)
		return NULL;
	one->size = size;
	one->nice = getpriority(PRIO_PROCESS, (id_t)syscall(SYS_gettid));
	snprintf(one->path, sizeof(one->path), "%s", path);
	pthread_condattr_init(&attributes);
	pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
	pthread_cond_init(&one->told, &attributes);
	pthread_condattr_destroy(&attributes);
	return one;
}

int host_read_patiently(const char *path, char *buf, uint32_t size, uint32_t patience_ms)
{
	struct timespec until;
	struct errand *one;
	int result;

	pthread_mutex_lock(&lock);
	result = left_behind < MOST_LEFT ? 0 : -EBUSY;
	pthread_mutex_unlock(&lock);
	if (result)
		return result;
	one = errand_of(path, size);
	if (!one)
		return -ENOMEM;
	result = begin(one);
	if (result) {
		let_go(one);
		return -result;
	}
	clock_gettime(CLOCK_MONOTONIC, &until);
	until.tv_sec += patience_ms / 1000;
	until.tv_nsec += patience_ms % 1000 * 1000000L;
	if (until.tv_nsec >= 1000000000L) {
		until.tv_sec++;
		until.tv_nsec -= 1000000000L;
	}
	pthread_mutex_lock(&lock);
	while (!one->done && pthread_cond_timedwait(&one->told, &lock, &until) != ETIMEDOUT)
		;
	one->left = !one->done;
	left_behind += (uint32_t)one->left;
	result = one->done ? one->result : -ETIMEDOUT;
	pthread_mutex_unlock(&lock);
	if (result == -ETIMEDOUT)
		return result;
	if (result > 0)
		memcpy(buf, one->buf, (uint32_t)result);
	let_go(one);
	return result;
}
