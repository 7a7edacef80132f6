#ifndef GFL_LOCK_H
#define GFL_LOCK_H

/* A lock that needs no call to set up: of the system, because not every C library has C11's threads.h. */

#if defined(_WIN32)
#define WIN32_LEAN_AND_MEAN
#include <windows.h>
#undef near /* words of 16-bit pointers, here names of variables */
#undef far
typedef SRWLOCK gfl_lock;
#define GFL_UNLOCKED SRWLOCK_INIT
static inline void gfl_take(gfl_lock *lock) { AcquireSRWLockExclusive(lock); }
static inline void gfl_give_back(gfl_lock *lock) { ReleaseSRWLockExclusive(lock); }
#else
#include <pthread.h>
typedef pthread_mutex_t gfl_lock;
#define GFL_UNLOCKED PTHREAD_MUTEX_INITIALIZER
static inline void gfl_take(gfl_lock *lock) { pthread_mutex_lock(lock); }
static inline void gfl_give_back(gfl_lock *lock) { pthread_mutex_unlock(lock); }
#endif

#endif
